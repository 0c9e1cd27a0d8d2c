"""Turn Constant nodes into initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from bitwright.compiler.graph.model import is_op
from bitwright.passes.contract import PassResult


@dataclass(frozen=True)
class LiftConstants:
    """Make every Constant an initializer of its own graph; one that is itself a graph output stays a node."""

    name: ClassVar[str] = "lift_constants"

    def run(self, model: ir.Model) -> PassResult:
        """Lift."""
        before = _constants(model)
        if before:
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        return PassResult(model, before - _constants(model))


def _constants(model: ir.Model) -> int:
    return sum(is_op(node, "Constant") for graph in model.graphs() for node in graph)
