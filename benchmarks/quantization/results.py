"""The results file: one JSON object a line, appended as soon as it is known; a later line replaces an earlier one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Results = dict[tuple[str, str], dict[str, Any]]


def read_results(path: Path) -> Results:
    """Return result by (model, competitor name); a line that was cut off while it was written is left out."""
    results: Results = {}
    if not path.exists():
        return results
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        results[row["model"], row["competitor"]] = row
    return results


def append_result(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line, on a line of its own even behind a line that was cut off."""
    cut_off = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if cut_off else "") + json.dumps(row) + "\n")
