"""Infer types and shapes of all values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_ir as ir

from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import more_precise
from bitwright.passes.weightless import weightless_proto


@dataclass(frozen=True)
class InferShapes:
    """Run onnx's shape inference, shape values propagated, and keep what is more precise than before.

    Weights are set aside first, so size does not matter. Values behind operators that onnx does not know keep
    what the model says about them; if inference as a whole fails, everything stays and a note says why.
    """

    name: ClassVar[str] = "infer_shapes"

    def run(self, model: ir.Model) -> PassResult:
        """Infer; ``changed`` counts the values that became better known."""
        try:
            proto = weightless_proto(model)
            inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
        except Exception as error:
            return PassResult(model, 0, (f"shape inference failed, known shapes are kept: {error}",))
        found = ir.from_proto(inferred)
        pairs = zip(model.graphs(), found.graphs(), strict=True)
        return PassResult(model, sum(_adopt(mine, theirs) for mine, theirs in pairs))


def _adopt(graph: ir.Graph, inferred: ir.Graph) -> int:
    known = ir.convenience.create_value_mapping(inferred, include_subgraphs=False)
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    return sum(_improve(value, known[name]) for name, value in values.items() if name in known)


def _improve(value: ir.Value, inferred: ir.Value) -> bool:
    shape = more_precise(value.shape, inferred.shape)
    type_ = value.type if value.type is not None else inferred.type
    if shape == value.shape and type_ == value.type:
        return False
    if type_ != value.type:
        value.type = type_
    if shape is not None and shape != value.shape:
        value.shape = shape
    return True
