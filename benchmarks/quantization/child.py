"""The quantizing process: runs one job and writes what happened as JSON.

usage: python -m quantization.child JOB.json OUTCOME.json
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

from quantization.job import read_job


def last_words(error: BaseException) -> str:
    """Return an error's type and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else '(no message)'}"[:300]


def main() -> int:
    job = read_job(Path(sys.argv[1]).read_text())
    module, name = job.function.split(":")
    start = time.perf_counter()
    outcome: dict[str, object] = {}
    try:
        getattr(import_module(module), name)(job)
    except (Exception, SystemExit) as error:
        import traceback

        traceback.print_exc()
        outcome["error"] = last_words(error)
    outcome["call_s"] = time.perf_counter() - start
    Path(sys.argv[2]).write_text(json.dumps(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
