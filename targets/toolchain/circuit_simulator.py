"""What simulating circuits needs on this machine: yosys, its C++ simulator's headers, a C++ compiler."""

from __future__ import annotations

import platform

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.toolchain.linker import find_driver
from bitwright.targets.toolchain.yosys import simulator_headers, yosys_missing


def machine_triple() -> str:
    """Return what this machine's compilers build for."""
    return f"{platform.machine()}-linux-gnu"


def simulator_missing() -> str | None:
    """Return what to install before circuits can be simulated, or None."""
    missing = yosys_missing()
    if missing is not None:
        return missing
    try:
        simulator_headers()
        find_driver(machine_triple(), "c++")
    except ToolchainError as error:
        return error.fix or error.what
    return None
