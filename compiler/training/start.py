"""Where training starts: at the weights and biases that quantization without training finds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import constant_array, node_label
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.training.rounding_points import RoundingPoints
from bitwright.passes.dequantized import dequantized_array
from bitwright.passes.stored_weights import FLOAT_TYPES, expand

# Of a step. A weight that ends up so far from its level still rounds to it (half a step would not), and is as near as
# it can be to the weight that the float model has, where a gradient may well want it back.
REACH = 0.4


def rounded_start(model: ir.Model, rounded: ir.Model, points: RoundingPoints) -> ir.Model:
    """Return a float model that rounds to nearest to what a better rounding gave, with its corrected biases.

    Rounding to nearest is far from the best that the same grid allows (Nagel et al. 2020, "Up or Down?"): training
    that started there would first have to find what the feedback of GPTQ has found in one pass.

    Args:
        model: The float model; not changed.
        rounded: The same behind the passes that round weights and correct biases.
        points: Made for ``model``; names the weights and their grids.
    """
    result = model.clone()
    nodes = {node_label(n): n for n in rounded.graph}
    for node in result.graph:
        found = nodes.get(node_label(node))
        if found is None or found.op_type != node.op_type:
            continue
        for value, array in (*_weight(result, node, found, points), *_biases(node, found)):
            value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)
    return result


def _weight(
    model: ir.Model, node: ir.Node, rounded: ir.Node, points: RoundingPoints
) -> Iterator[tuple[ir.Value, NDArray[np.float32]]]:
    """Yield the initializer behind a node's weight, and its start."""
    decision = points.plan.nodes.get(node_label(node))
    if decision is None or decision.weight not in points.weight_names or weight_of(node) is None:
        return
    quant = points.plan.weights[decision.weight]
    name, order = points.weight_names[decision.weight]
    levels, value = dequantized_array(rounded.inputs[1]), model.graph.initializers.get(name)
    array = constant_array(value)
    if levels is None or value is None or array is None or quant.dtype in FLOAT_TYPES:
        return
    step = REACH * expand(quant.scale, quant, levels.shape)
    seen = array if order is None else array.transpose(order)
    start = np.clip(seen, levels - step, levels + step).astype(np.float32)
    yield value, start if order is None else start.transpose(np.argsort(order))


def _biases(node: ir.Node, rounded: ir.Node) -> Iterator[tuple[ir.Value, NDArray[np.float32]]]:
    """Yield the constant vectors that were corrected; those that several nodes read stay."""
    places = {"Conv": (2,), "Gemm": (2,), "Add": (0, 1)}.get(node.op_type, ())
    for index in places:
        if index >= len(node.inputs) or index >= len(rounded.inputs):
            continue
        value, found = node.inputs[index], constant_array(rounded.inputs[index])
        before = constant_array(value)
        if value is None or found is None or before is None or len(value.uses()) > 1:
            continue
        if found.shape == before.shape and found.dtype == before.dtype == np.float32:
            yield value, found
