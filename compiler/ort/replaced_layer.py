"""One layer of a quantized model computed in float again, where its quantized form is another operator altogether."""

from __future__ import annotations

import onnx_ir as ir

from bitwright.compiler.graph.model import (
    FreshNames,
    constant_array,
    consumers,
    is_op,
    node_label,
    only_consumer,
)
from bitwright.compiler.graph.operands import weight_of
from bitwright.passes.rewriting import add_initializer

LONGEST_TAIL = 4


def compute_in_float(model: ir.Model, float_model: ir.Model, node: str) -> bool:
    """Let a layer's output be computed by the float model's nodes, in place.

    Packed, looked-up and dynamically quantized products have no quantizers that could be left out; what they read and
    write is float.

    Args:
        model: The quantized model.
        float_model: The model that it was made from.
        node: Name of the layer's node in ``float_model``.

    Returns:
        Whether it could be done: the quantized model has what the layer reads and writes, under the same names and
        types.
    """
    known = {v.name: v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs))}
    chain = _chain(float_model, node, known)
    if not chain or not all(_available(v, chain, known) for n in chain for v in n.inputs):
        return False
    written = known[chain[-1].outputs[0].name]
    producer = written.producer()
    if producer is None:
        return False
    fresh, made = FreshNames(model), dict[ir.Value, ir.Value]()
    copies = [_copy(n, model, known, made, fresh) for n in chain]
    model.graph.insert_after(producer, copies)
    result = copies[-1].outputs[0]
    for user, index in tuple(written.uses()):
        if user not in copies:
            user.replace_input_with(index, result)
    _take_over_output(model, written, result, fresh)
    return True


def pass_quantizer(model: ir.Model, tensor: str) -> bool:
    """Let the readers of a quantized tensor read it as it was before it was quantized, in place.

    Args:
        model: The quantized model.
        tensor: Name of the float tensor that a QuantizeLinear reads.

    Returns:
        Whether anybody read it through a quantizer.
    """
    passed = False
    for written, dequantized in quantized_copies(model, tensor):
        for user, index in tuple(dequantized.uses()):
            user.replace_input_with(index, written)
            passed = True
    return passed


def quantized_copies(model: ir.Model, tensor: str) -> list[tuple[ir.Value, ir.Value]]:
    """Return a float tensor of the main graph with each value that is made from it by quantizing and dequantizing."""
    written = next((o for n in model.graph for o in n.outputs if o.name == tensor), None)
    if written is None:
        return []
    quantizers = [n for n in consumers(written) if is_op(n, "QuantizeLinear")]
    return [(written, d.outputs[0]) for q in quantizers for d in consumers(q.outputs[0])]


def _chain(float_model: ir.Model, name: str, known: dict[str | None, ir.Value]) -> list[ir.Node]:
    """Return the node and those behind it up to the first value that the other model has, too."""
    node = next((n for n in float_model.graph if node_label(n) == name), None)
    chain: list[ir.Node] = []
    while node is not None and len(chain) <= LONGEST_TAIL:
        chain.append(node)
        if node.outputs[0].name in known:
            return chain
        node = only_consumer(node.outputs[0])
        if node is not None and weight_of(node) is not None:  # a layer of its own
            break
    return []


def _available(value: ir.Value | None, chain: list[ir.Node], known: dict[str | None, ir.Value]) -> bool:
    if value is None or value.producer() in chain or constant_array(value) is not None:
        return True
    other = known.get(value.name)
    return other is not None and other.dtype == value.dtype


def _copy(
    node: ir.Node,
    model: ir.Model,
    known: dict[str | None, ir.Value],
    made: dict[ir.Value, ir.Value],
    fresh: FreshNames,
) -> ir.Node:
    def operand(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in made:
            return None if value is None else made[value]
        array = constant_array(value)
        if array is None:
            return known[value.name]
        return add_initializer(model.graph, fresh(f"{value.name}_float"), array)

    inputs = [operand(v) for v in node.inputs]
    copy = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), num_outputs=1)
    copy.outputs[0].name = fresh(f"{node.outputs[0].name}_float")
    copy.outputs[0].type = node.outputs[0].type
    made[node.outputs[0]] = copy.outputs[0]
    return copy


def _take_over_output(model: ir.Model, written: ir.Value, result: ir.Value, fresh: FreshNames) -> None:
    """Make ``result`` the graph's output if ``written`` is one, under the same name."""
    for index, value in enumerate(model.graph.outputs):
        if value is written:
            name = written.name
            written.name = fresh(f"{name}_replaced")
            result.name, result.shape = name, written.shape
            model.graph.outputs[index] = result
