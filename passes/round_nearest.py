"""Replace the weights that the plan quantizes by integers (round to nearest) and a DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, node_label
from bitwright.compiler.graph.operands import weight_array, weight_of
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer

BLOCK = 1 << 18  # elements that are rounded at a time: the steps in between are copies of what they work on


def round_to_nearest(weight: np.ndarray, scale: np.ndarray, axis: int | None, dtype: str) -> np.ndarray:
    """Return ``clip(rint(w / s), -qmax, qmax)``; rounding is half to even, the smallest integer stays unused.

    Args:
        weight: float32, of at least one dimension.
        scale: float32, one per index of ``axis``, or one element when ``axis`` is None.
        axis: Channel axis of the scales.
        dtype: ``"int8"``.
    """
    largest = np.iinfo(dtype).max
    shape = [1] * weight.ndim
    if axis is not None:
        shape[axis] = -1
    divisors = scale.astype(np.float32).reshape(shape)
    integers: np.ndarray = np.empty(weight.shape, dtype)
    rows = max(1, BLOCK // max(1, weight[:1].size))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        steps = weight[part].astype(np.float32) / (divisors[part] if axis == 0 else divisors)
        integers[part] = np.clip(np.rint(steps), -largest, largest)
    return integers


@dataclass(frozen=True)
class RoundNearest:
    """Quantize the weight operand of every node that the plan runs on integers.

    Attributes:
        plan: Names the weight of each node and its scales.
    """

    plan: Plan

    @property
    def name(self) -> str:
        """The pass's name."""
        return "round_nearest"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        fresh = FreshNames(model)
        done: dict[str, ir.Value] = {}
        changed = 0
        for node in list(model.graph):
            decision = self.plan.nodes.get(node_label(node))
            weight = weight_of(node)
            if decision is None or not decision.weight or weight is None:
                continue
            if decision.weight not in done:
                done[decision.weight] = _dequantized(model, node, self.plan.weights[decision.weight], fresh)
            node.replace_input_with(1, done[decision.weight])
            changed += 1
        return PassResult(model, changed)


def _dequantized(model: ir.Model, node: ir.Node, quant: WeightQuant, fresh: FreshNames) -> ir.Value:
    weight = node.inputs[1]
    assert weight is not None
    array = round_to_nearest(weight_array(weight), quant.scale, quant.axis, quant.dtype)
    per_tensor = quant.axis is None
    scale = quant.scale.reshape(()) if per_tensor else quant.scale
    zero = np.zeros(scale.shape, quant.dtype)
    stem = weight.name or "weight"
    inputs = [
        add_initializer(model.graph, fresh(f"{stem}_quantized"), array),
        add_initializer(model.graph, fresh(f"{stem}_scale"), scale.astype(np.float32)),
        add_initializer(model.graph, fresh(f"{stem}_zero_point"), zero),
    ]
    attributes = [] if per_tensor else [ir.AttrInt64("axis", int(quant.axis or 0))]
    dequantize = ir.Node(
        "", "DequantizeLinear", inputs, attributes, num_outputs=1, name=fresh(f"{stem}_DequantizeLinear")
    )
    result = dequantize.outputs[0]
    result.name = fresh(f"{stem}_dequantized")
    result.dtype, result.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
    model.graph.insert_before(_first(model, node), dequantize)
    return result


def _first(model: ir.Model, node: ir.Node) -> ir.Node:
    """Constants may be read by any later node, so their DequantizeLinear goes to the front of the graph."""
    return next(iter(model.graph), node)
