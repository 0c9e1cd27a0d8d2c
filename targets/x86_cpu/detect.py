"""The ``host`` profile: what this x86 machine says about itself, as a profile that extends a shipped one.

Only what the operating system reports is replaced (clock, cores, cache and memory sizes, missing
instructions); instruction rates, bandwidths and overheads stay those of the profile it extends, and the
provenance says so.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from bitwright.compiler.errors import ProfileError

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_AVX2_FLAGS = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"})
_VNNI_FLAGS = _AVX2_FLAGS | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}
_AMX_FLAGS = _VNNI_FLAGS | {"amx_tile", "amx_int8"}

_LLVM_FEATURES = {
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx_vnni": "avxvnni",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
}
"""Linux flag -> LLVM feature, for what LLVM may emit on its own and a hypervisor may hide."""

_IN_MCPU = {
    "haswell": frozenset[str](),
    "cascadelake": frozenset[str](),
    "icelake-server": frozenset(_LLVM_FEATURES) - {"avx512_bf16", "avx512_fp16", "avx_vnni"},
    "sapphirerapids": frozenset(_LLVM_FEATURES),
}
_GUEST_CACHE_PER_CORE = 4 * 1024 * 1024


@dataclass(frozen=True)
class Machine:
    """What the operating system reports.

    Attributes:
        flags: Linux CPU flags of the first processor.
        model: Marketing name.
        clock_hz: Base clock.
        clock_source: Where the clock was read.
        cores: Physical cores this process may use.
        caches: (level, bytes, per core) of data and unified caches, nearest first.
        ram_bytes: Main memory.
    """

    flags: frozenset[str]
    model: str
    clock_hz: float
    clock_source: str
    cores: int
    caches: tuple[tuple[int, int, bool], ...]
    ram_bytes: int


def describe_host() -> str:
    """Return the YAML text of the ``host`` profile of this machine.

    Raises:
        ProfileError: This machine is not an x86 Linux machine with AVX2.
    """
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64") or not _CPUINFO.exists():
        what = f"the host profile describes x86 Linux machines; this one is {platform.system()} on {machine}"
        raise ProfileError(what, where="host", fix="name a profile; see 'bitwright targets list'")
    usable = len(os.sched_getaffinity(0))
    return describe(
        read_machine(_CPUINFO.read_text("utf-8"), _MEMINFO.read_text("utf-8"), read_caches(_CACHES), usable)
    )


def read_caches(folder: Path) -> tuple[tuple[int, int, bool], ...]:
    """Return (level, bytes, per core) of every data or unified cache that /sys lists, nearest first."""
    found = []
    for index in sorted(folder.glob("index*")):
        fields = {n: (index / n).read_text("ascii").strip() for n in ("level", "type", "size")}
        size = re.fullmatch(r"([0-9]+)([KM])", fields["size"])
        if fields["type"] == "Instruction" or size is None:
            continue
        scale = 1024 if size[2] == "K" else 1024 * 1024
        level = int(fields["level"])
        found.append((level, int(size[1]) * scale, level < 3))
    return tuple(sorted(found))


def read_machine(
    cpuinfo: str, meminfo: str, caches: tuple[tuple[int, int, bool], ...], usable: int
) -> Machine:
    """Return what /proc says.

    Args:
        cpuinfo: Text of /proc/cpuinfo.
        meminfo: Text of /proc/meminfo.
        caches: From :func:`read_caches`.
        usable: Processors that this process may run on.

    Raises:
        ProfileError: No flags or no clock in ``cpuinfo``.
    """
    blocks = [_fields(block) for block in cpuinfo.strip().split("\n\n")]
    first = blocks[0]
    if "flags" not in first:
        msg = "/proc/cpuinfo lists no CPU flags"
        raise ProfileError(msg, where="host", fix="name a profile instead of 'host'")
    clock, source = _clock(first)
    cores = len({(b.get("physical id", "0"), b.get("core id", b.get("processor", ""))) for b in blocks})
    total = re.search(r"^MemTotal:\s+([0-9]+) kB", meminfo, re.MULTILINE)
    ram = int(total[1]) * 1024 if total else 8 * 1024**3
    model = first.get("model name", "unknown x86 processor")
    return Machine(frozenset(first["flags"].split()), model, clock, source, min(cores, usable), caches, ram)


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _clock(fields: dict[str, str]) -> tuple[float, str]:
    """Return the base clock: from the name if it tells, else half of bogomips (the time-stamp rate)."""
    named = re.search(r"@ ([0-9.]+)GHz", fields.get("model name", ""))
    if named:
        return float(named[1]) * 1e9, "model name"
    if "bogomips" in fields:
        return float(fields["bogomips"]) * 1e6 / 2, "bogomips / 2"
    if "cpu MHz" in fields:
        return float(fields["cpu MHz"]) * 1e6, "cpu MHz"
    msg = "/proc/cpuinfo names no clock"
    raise ProfileError(msg, where="host", fix="name a profile instead of 'host'")


def choose_base(flags: frozenset[str]) -> tuple[str, str]:
    """Return the shipped profile and the LLVM processor that fit the flags.

    Raises:
        ProfileError: The processor lacks AVX2 or what comes with it.
    """
    if flags >= _AMX_FLAGS:
        return "x86-amx", "sapphirerapids"
    if flags >= _VNNI_FLAGS:
        modern = {"gfni", "vaes", "avx512_vbmi2"} <= flags
        return "x86-avx512-vnni", "icelake-server" if modern else "cascadelake"
    if flags >= _AVX2_FLAGS:
        return "x86-avx2", "haswell"
    missing = ", ".join(sorted(_AVX2_FLAGS - flags))
    msg = f"this processor lacks {missing}"
    raise ProfileError(msg, where="host", fix="use a machine with AVX2 and FMA")


def describe(machine: Machine) -> str:
    """Return the YAML text of a profile of ``machine``."""
    base, mcpu = choose_base(machine.flags)
    hidden = sorted(_LLVM_FEATURES[f] for f in _IN_MCPU[mcpu] - machine.flags)
    profile = {
        "schema": 1,
        "name": "host",
        "extends": base,
        "description": f"This machine: {machine.model}, {machine.cores} cores, as {base}.",
        "clock_hz": machine.clock_hz,
        "cores": machine.cores,
        "codegen": {"mcpu": mcpu, "mattr": [f"-{feature}" for feature in hidden]},
        "memory": _memory(machine),
        "provenance": {
            "clock_hz": _source(f"/proc/cpuinfo ({machine.clock_source}), detected", "estimate"),
            "memory": _source(
                f"sizes detected from /sys and /proc/meminfo{_guest(machine)}; bandwidths of {base}"
            ),
        },
    }
    return yaml.safe_dump(profile, sort_keys=False, width=1000)


def _memory(machine: Machine) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for level, size, per_core in machine.caches:
        name = "l1d" if level == 1 else f"l{level}"
        kept = (
            min(size, _GUEST_CACHE_PER_CORE * machine.cores) if _is_guest(machine) and not per_core else size
        )
        rows.append({"name": name, "size_bytes": float(kept), "per_core": per_core})
    listed = {row["name"] for row in rows}
    if not rows:
        return [
            {"name": "dram", "size_bytes": float(machine.ram_bytes)}
        ]  # no /sys: the caches of the base stay
    absent: list[dict[str, object]] = [
        {"name": n, "remove": True} for n in ("l1d", "l2", "l3") if n not in listed
    ]
    return [*rows, *absent, {"name": "dram", "size_bytes": float(machine.ram_bytes)}]


def _is_guest(machine: Machine) -> bool:
    return "hypervisor" in machine.flags


def _guest(machine: Machine) -> str:
    """Return the note on a shared cache that other guests use too."""
    return " (shared cache counted as at most 4 MiB a core: a virtual machine)" if _is_guest(machine) else ""


def _source(source: str, confidence: str = "estimate") -> dict[str, str]:
    return {"source": source, "confidence": confidence}
