"""TVM's target description from a profile."""

from __future__ import annotations

from typing import Any

from bitwright.targets.schema import Profile


def llvm_target(profile: Profile) -> dict[str, Any]:
    """Return the dictionary for ``tvm.target.Target``: processor, features and the cores it may use."""
    codegen = profile.codegen
    target: dict[str, Any] = {"kind": codegen.kind, "mtriple": codegen.mtriple, "mcpu": codegen.mcpu}
    if codegen.mattr:
        target["mattr"] = list(codegen.mattr)
    return {**target, "num-cores": profile.cores}
