"""Whether this machine is the one a profile describes, and what it is: times may be measured nowhere else."""

from __future__ import annotations

import platform
from pathlib import Path

from bitwright.compiler.errors import ProfileError, UsageError
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import HOST, load_profile
from bitwright.targets.schema import GENERATED_FAMILIES, Profile

_CPUINFO = Path("/proc/cpuinfo")


def why_another(profile: Profile) -> str | None:
    """Return why times measured here would not be the target's, or None if this machine is it.

    Being able to run the target's code is not enough: ONNX Runtime uses whatever instructions it finds, so the
    processor must have exactly those of the profile.
    """
    if profile.family in GENERATED_FAMILIES:
        return f"{profile.family} is no processor that runs this program"
    missing = backend_for(profile.family).why_not_executable(profile)
    if missing is not None:
        return missing
    try:
        here = load_profile(HOST)
    except ProfileError as error:
        return error.what
    if here.family != profile.family:
        return f"this machine is of the family {here.family}, not {profile.family}"
    ours, theirs = ({row.name for row in p.compute} for p in (here, profile))
    if more := sorted(ours - theirs):
        return f"this processor also has {', '.join(more)}, which ONNX Runtime would use"
    if fewer := sorted(theirs - ours):
        return f"this processor lacks {', '.join(fewer)}"
    return None


def check_this_machine(profile: Profile, where: str) -> None:
    """Refuse a target that this machine is not.

    Raises:
        UsageError: With the reason.
    """
    reason = why_another(profile)
    if reason is not None:
        what = f"'{profile.name}' cannot be measured here: {reason}"
        raise UsageError(what, where=where, fix=f"run the probe on the device, or measure '{HOST}' here")


def machine_name() -> str:
    """Return the processor's name as the system tells it, and the operating system."""
    name = platform.processor() or platform.machine()
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text("utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                name = value.strip()
                break
    return f"{name}, {platform.system()}"
