"""Insert QuantizeLinear/DequantizeLinear exactly where the plan has integers, in the form that runtimes fuse.

The rules come from what ONNX Runtime really turns into integer kernels: explicit zero points everywhere (weights and
biases too), int32 biases with scale ``input_scale * weight_scale``, per-channel axis of the output channels, no
quantizer inside a fused chain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import STANDARD_DOMAINS, FreshNames, constant_array, node_label
from bitwright.compiler.graph.operands import activations_of
from bitwright.compiler.plan.model import ActivationQuant, NodeDecision, Plan
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer
from bitwright.passes.stored_weights import stored_type

# Opsets that brought QuantizeLinear to wider types than 8-bit integers. Opset 19 has 8-bit floats, but names their type
# by a zero point only, and ONNX Runtime 1.31 takes a zero point of 0 for an unsigned integer's: it drops the Relu in
# front. Opset 21 names the type by an attribute.
OPSET_OF_TYPE = {"uint16": 21, "int16": 21, "float8_e4m3fn": 21, "float8_e5m2": 21}


def activation_opset(quants: Iterable[ActivationQuant]) -> int:
    """Return the oldest opset whose quantizers write all of these activations, 0 if any will do."""
    return max((OPSET_OF_TYPE.get(q.dtype, 0) for q in quants), default=0)


@dataclass(frozen=True)
class InsertQDQ:
    """Quantize activations and biases as the plan says; weights were done by a rounding pass before.

    Attributes:
        plan: Names tensors by their name in this model.
        float_bias: Leave biases in float, for runtimes that take no integer bias.
    """

    plan: Plan
    float_bias: bool = False

    @property
    def name(self) -> str:
        """The pass's name."""
        return "insert_qdq"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place.

        Raises:
            ModelError: The model's opset is older than the quantizers of the plan's types.
        """
        _require_opset(model, activation_opset(self.plan.activations.values()))
        integer = {n: d for n in model.graph if (d := self.plan.nodes.get(node_label(n))) and d.integer}
        if any(_is_dequantized(v) for n in integer for v in activations_of(n)):
            return PassResult(model, 0, ("the activations are quantized already",))
        fresh = FreshNames(model)
        for node, decision in () if self.float_bias else integer.items():
            _quantize_bias(model, node, decision, self.plan, fresh)
        values = {v.name: v for v in _all_values(model)}
        for quant in self.plan.activations.values():
            _quantize_activation(model, values[quant.tensor], quant, integer, fresh)
        return PassResult(model, len(self.plan.activations))


def _require_opset(model: ir.Model, needed: int) -> None:
    opset = next((model.opset_imports[d] for d in STANDARD_DOMAINS if d in model.opset_imports), 0)
    if opset < needed:
        msg = f"16-bit integers and 8-bit floats as activations need opset {needed}, the model has {opset}"
        raise ModelError(
            msg, where=model.graph.name or "model", fix=f"raise the model to opset {needed} first"
        )


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _all_values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(o for n in model.graph for o in n.outputs)]


def _node(op_type: str, inputs: list[ir.Value], stem: str, dtype: ir.DataType, fresh: FreshNames) -> ir.Node:
    node = ir.Node("", op_type, inputs, num_outputs=1, name=fresh(f"{stem}_{op_type}"))
    node.outputs[0].dtype = dtype
    node.outputs[0].shape = inputs[0].shape
    return node


def _quantize_activation(
    model: ir.Model,
    value: ir.Value,
    quant: ActivationQuant,
    integer: dict[ir.Node, NodeDecision],
    fresh: FreshNames,
) -> None:
    stem = value.name or "tensor"
    scale = add_initializer(model.graph, fresh(f"{stem}_scale"), np.asarray(quant.scale, np.float32))
    stored = stored_type(quant.dtype)
    kind = ir.DataType.from_numpy(stored)
    parameters = [scale]
    if not quant.dtype.startswith("float8"):
        zero_point = np.asarray(quant.zero_point).astype(stored)
        parameters.append(add_initializer(model.graph, fresh(f"{stem}_zero_point"), zero_point))
    readers = list(value.uses())
    quantize = _node("QuantizeLinear", [value, *parameters], stem, kind, fresh)
    if len(parameters) == 1:
        quantize.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(kind))
    quantize.outputs[0].name = fresh(f"{stem}_quantized")
    dequantize = _node("DequantizeLinear", [quantize.outputs[0], *parameters], stem, ir.DataType.FLOAT, fresh)
    for node, index in readers:
        reads_integers = node in integer and value in activations_of(node)[: index + 1]
        if reads_integers or not quant.float_copy:
            node.replace_input_with(index, dequantize.outputs[0])
    _insert_behind(model, value, [quantize, dequantize])
    dequantized = dequantize.outputs[0]
    if value.is_graph_output() and not quant.float_copy:
        _take_over_output(model, value, dequantized, fresh)
    else:
        dequantized.name = fresh(f"{stem}_dequantized")


def _insert_behind(model: ir.Model, value: ir.Value, nodes: list[ir.Node]) -> None:
    producer = value.producer()
    if producer is not None:
        model.graph.insert_after(producer, nodes)
    else:
        model.graph.insert_before(next(iter(model.graph)), nodes)


def _take_over_output(model: ir.Model, value: ir.Value, dequantized: ir.Value, fresh: FreshNames) -> None:
    """Let the dequantized value be the graph output under the name the user knows."""
    name = value.name
    value.name = fresh(f"{name}_float")
    dequantized.name = name
    for k, output in enumerate(model.graph.outputs):
        if output is value:
            model.graph.outputs[k] = dequantized


def _quantize_bias(
    model: ir.Model, node: ir.Node, decision: NodeDecision, plan: Plan, fresh: FreshNames
) -> None:
    bias = node.inputs[2] if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2 else None
    array = constant_array(bias)
    if bias is None or array is None or not decision.weight:
        return
    activation = plan.activations[decision.inputs[0]]
    if activation.dtype.startswith("float8"):  # products of floats are summed with a float bias
        return
    input_scale = np.float32(activation.scale)
    scale = (input_scale * plan.weights[decision.weight].scale).astype(np.float32)
    if scale.size == 1:
        scale = np.repeat(scale, array.size)
    integers = np.rint(array.reshape(-1).astype(np.float64) / scale).astype(np.int32)
    stem = bias.name or "bias"
    inputs = [
        add_initializer(model.graph, fresh(f"{stem}_quantized"), integers),
        add_initializer(model.graph, fresh(f"{stem}_scale"), scale),
        add_initializer(model.graph, fresh(f"{stem}_zero_point"), np.zeros(scale.shape, np.int32)),
    ]
    dequantize = ir.Node(
        "",
        "DequantizeLinear",
        inputs,
        [ir.AttrInt64("axis", 0)],
        num_outputs=1,
        name=fresh(f"{stem}_DequantizeLinear"),
    )
    dequantize.outputs[0].name = fresh(f"{stem}_dequantized")
    dequantize.outputs[0].dtype, dequantize.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(integers.shape)
    model.graph.insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])
