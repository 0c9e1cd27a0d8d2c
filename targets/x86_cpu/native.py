"""Running x86-64 artifacts on this machine: what its processor has and how the runner is started."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.runner import Launch

RUN_TIMEOUT_S = 600.0
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

_AVX2 = ("avx2", "fma", "bmi2", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_VNNI = (*_AVX512, "avx512_vnni")
_AMX = (*_VNNI, "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8")

# LLVM processor name -> the /proc/cpuinfo flags that code made for it may need. A processor that is not in
# the table is not checked in advance: the run itself then tells, by an illegal instruction.
FLAGS_OF_CPU = {
    "x86-64": (),
    "x86-64-v2": ("sse4_2", "ssse3", "popcnt"),
    "x86-64-v3": _AVX2,
    "x86-64-v4": _AVX512,
    "haswell": _AVX2,
    "broadwell": _AVX2,
    "skylake": _AVX2,
    "znver1": _AVX2,
    "znver2": _AVX2,
    "znver3": _AVX2,
    "alderlake": (*_AVX2, "avx_vnni"),
    "skylake-avx512": _AVX512,
    "cascadelake": _VNNI,
    "icelake-client": _VNNI,
    "icelake-server": _VNNI,
    "tigerlake": _VNNI,
    "rocketlake": _VNNI,
    "znver4": (*_VNNI, "avx512_bf16"),
    "sapphirerapids": _AMX,
    "emeraldrapids": _AMX,
    "graniterapids": _AMX,
}
# LLVM feature -> /proc/cpuinfo flag, where the spelling differs in more than hyphens.
FLAG_OF_FEATURE = {
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxvnni": "avx_vnni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "lzcnt": "abm",
}


@cache
def processor_flags() -> frozenset[str]:
    """Return the flags line of /proc/cpuinfo, empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "flags:")
    return frozenset(line.partition(":")[2].split())


def required_flags(profile: Profile) -> tuple[str, ...]:
    """Return the processor flags that code for ``profile`` may need."""
    added = (a[1:] for a in profile.codegen.mattr if a.startswith("+"))
    flags = [FLAG_OF_FEATURE.get(name, name.replace("-", "_")) for name in added]
    return (*FLAGS_OF_CPU.get(profile.codegen.mcpu, ()), *flags)


def why_not_executable(profile: Profile) -> str | None:
    """Return why this machine cannot run code for ``profile``, or None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"this machine is {platform.system()} on {platform.machine()}, not Linux on x86_64"
    missing = [flag for flag in required_flags(profile) if flag not in processor_flags()]
    return f"this processor lacks {', '.join(missing)}" if missing else None


def launch(profile: Profile) -> Launch:
    """Return how the runner is started: directly, with the profile's number of threads."""
    threads = {"TVM_NUM_THREADS": str(profile.cores)}
    return Launch(prefix=(), environment=threads, executed="native", timeout_s=RUN_TIMEOUT_S)


def prepare(profile: Profile) -> None:
    """Ask for the tile registers if the profile uses them: without the permission their use is a crash."""
    if any(row.name == "amx_int8" for row in profile.compute):
        ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
