"""What this machine's processor is called."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

# Where there is no name, an Arm processor is known by the numbers of its maker and its kind.
_NUMBERS = ("CPU implementer", "CPU part", "CPU variant")


@cache
def processor_name() -> str:
    """Return the processor's name as the operating system gives it."""
    try:
        return read_name(Path("/proc/cpuinfo").read_text()) or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def read_name(cpuinfo: str) -> str:
    """Return the name in the text of /proc/cpuinfo, empty where it holds none."""
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    found: dict[str, str] = {}
    for name, _, value in pairs:
        found.setdefault(name.strip(), value.strip())
    if found.get("model name"):
        return found["model name"]
    return " ".join(f"{name.split()[-1]} {found[name]}" for name in _NUMBERS if name in found)
