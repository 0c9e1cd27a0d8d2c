"""Runs a yosys script; a process of its own, because a native library may crash and has no time limit.

Started by path, so that nothing of the package is imported: ``python yosys_child.py SCRIPT``.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(script: Path) -> None:
    """Run every line of a script."""
    from pyosys import libyosys

    design = libyosys.Design()
    for line in script.read_text("utf-8").splitlines():
        if line.strip():
            libyosys.run_pass(line, design)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
