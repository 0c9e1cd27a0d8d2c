"""What this machine's processor is called."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

# A name alone may be a hypervisor's; where there is none, an Arm processor is known by its maker's numbers.
_X86_NUMBERS = ("cpu family", "model", "stepping")
_ARM_NUMBERS = ("CPU implementer", "CPU part", "CPU variant")


def native_triple() -> str:
    """Return this machine's triple, e.g. ``x86_64-linux-gnu``."""
    return f"{platform.machine()}-linux-gnu"


@cache
def processor_name() -> str:
    """Return the processor's name as the operating system gives it."""
    try:
        return read_name(Path("/proc/cpuinfo").read_text()) or platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def read_name(cpuinfo: str) -> str:
    """Return the name in the text of /proc/cpuinfo and the maker's numbers, empty where it holds none."""
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    found: dict[str, str] = {}
    for name, _, value in pairs:
        found.setdefault(name.strip(), value.strip())
    if found.get("model name"):
        numbers = "-".join(found[name] for name in _X86_NUMBERS if name in found)
        return f"{found['model name']} {numbers}".strip()
    return " ".join(f"{name.split()[-1]} {found[name]}" for name in _ARM_NUMBERS if name in found)
