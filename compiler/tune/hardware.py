"""What a kernel's time depends on besides its work: the processor, the compiler and the templates."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import bitwright
from bitwright.compiler.tune.farm import Farm, board_name
from bitwright.targets.backend import Backend, TunableBackend, backend_for
from bitwright.targets.schema import Profile


def processor_of(profile: Profile, farm: Farm | None) -> str | None:
    """Return the name of what kernels for a profile would be timed on, None if nothing here can time them.

    Needs no TVM, and neither boards nor a tracker: records are looked up by this name.
    """
    if farm is not None:
        return board_name(farm.device_key)
    backend = backend_for(profile.family)
    if not isinstance(backend, TunableBackend):
        return None
    timer = backend.kernel_timer(profile)
    if timer is not None:
        return timer.hardware
    return backend.hardware() if backend.executes_natively(profile) else None


def cannot_time(profile: Profile, backend: Backend) -> str:
    """Return why this machine cannot time kernels for a profile."""
    if not isinstance(backend, TunableBackend):
        return f"family '{profile.family}' has no timer"
    return backend.why_not_executable(profile) or "they run in an emulator, whose clock means nothing"


def hardware_key(profile: Profile, processor: str) -> str:
    """Return the identity of everything but the work: records of another one are not used.

    Args:
        profile: Its family, code generation and the instructions that it allows.
        processor: The real name of what the times were taken on: of this machine's processor, of a board in an
            RPC farm, or of a model of cycles.
    """
    codegen = profile.codegen
    features = ",".join(codegen.mattr)
    return " | ".join(
        (
            profile.family,
            processor,
            f"{codegen.mtriple} {codegen.mcpu} {features}".strip(),
            f"rows {_allowed(profile)}",
            "threads 1",  # kernels are timed on one thread
            f"templates {template_version(profile.family)}",
            f"tvm {tvm_version()}",
        )
    )


def _allowed(profile: Profile) -> str:
    """Return a digest of what decides which kernels are candidates."""
    dumped = profile.dump()
    kept = {"compute": [row["name"] for row in dumped["compute"]], "spaces": dumped["qspaces"]}
    rules = dumped["runtimes"]["artifact"].get("ops", {})
    return _digest(json.dumps({**kept, "ops": rules}, sort_keys=True, default=str).encode())


@cache
def template_version(family: str) -> str:
    """Return a digest of the sources that kernels are made by: the shared templates and the family's own."""
    root = Path(bitwright.__file__).parent
    folders = (root / "compiler" / "lower" / "templates", root / "targets" / family)
    sources = sorted(path for folder in folders for path in folder.glob("*.py"))
    return _digest(b"".join(path.name.encode() + path.read_bytes() for path in sources))


def tvm_version() -> str:
    """Return the version of TVM, whose LLVM turns templates into code."""
    try:
        return version("apache-tvm")
    except PackageNotFoundError:
        return "none"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
