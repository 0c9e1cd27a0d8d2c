"""Running aarch64 artifacts: natively on an aarch64 machine, else in qemu's user-mode emulator."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.linker import is_native
from bitwright.targets.toolchain.process import run_tool
from bitwright.targets.toolchain.runner import Launch
from bitwright.targets.toolchain.runtime_libraries import cached_folder

# Emulation is tens to hundreds of times slower than silicon.
RUN_TIMEOUT_S = 3600.0
# Library the artifact needs -> the Debian and Ubuntu package that has it.
SYSROOT_LIBRARIES = {
    "ld-linux-aarch64.so.1": "libc6-arm64-cross",
    "libstdc++.so.6": "libstdc++6-arm64-cross",
    "libgcc_s.so.1": "libgcc-s1-arm64-cross",
}


def sysroot() -> Path:
    """Return the folder whose ``lib`` holds the aarch64 C and C++ libraries; qemu's variable overrides it."""
    return Path(os.environ.get("QEMU_LD_PREFIX", "/usr/aarch64-linux-gnu"))


def why_not_executable(profile: Profile) -> str | None:
    """Return why this machine cannot run code for ``profile``, or None if it can."""
    if is_native(profile.toolchain.triple):
        return None
    emulator = profile.toolchain.emulator
    if emulator is None:
        return f"profile '{profile.name}' names no emulator"
    missing = [] if shutil.which(emulator.command) else ["qemu-user"]
    missing += [
        package for name, package in SYSROOT_LIBRARIES.items() if not (sysroot() / "lib" / name).exists()
    ]
    if missing:
        return f"missing system packages: {' '.join(missing)} (apt-get install {' '.join(missing)})"
    # What follows a comma are properties of that processor.
    if emulator.cpu.split(",")[0] not in _known_cpus(emulator.command):
        return f"this {emulator.command} does not know the processor '{emulator.cpu}'"
    if not cached_folder(profile.toolchain.triple).exists() and find_spec("pip") is None:
        return "TVM's aarch64 runtime libraries are not here, nor is pip, which would download them"
    return None


@cache
def _known_cpus(command: str) -> frozenset[str]:
    # Older releases print the list and exit with 1.
    listing = run_tool([command, "-cpu", "help"], what="asking qemu", timeout_s=30, accepted=(0, 1))
    return frozenset(listing.split())


def launch(profile: Profile, cpu: str | None = None) -> Launch:
    """Return how the runner is started for a profile.

    Args:
        profile: Names the emulator and the processor it imitates.
        cpu: Another processor to imitate, to prove that older ones refuse the code.

    Raises:
        ToolchainError: The profile names no emulator, or none is installed.
    """
    threads = {"TVM_NUM_THREADS": str(profile.cores)}
    if cpu is None and is_native(profile.toolchain.triple):
        return Launch(prefix=(), environment=threads, executed="native", timeout_s=RUN_TIMEOUT_S)
    emulator = profile.toolchain.emulator
    command = shutil.which(emulator.command) if emulator else None
    if emulator is None or command is None:
        raise ToolchainError(why_not_executable(profile) or "no emulator", where=profile.name)
    prefix = (command, "-cpu", cpu or emulator.cpu, "-L", str(sysroot()))
    return Launch(prefix=prefix, environment=threads, executed="emulated", timeout_s=RUN_TIMEOUT_S)
