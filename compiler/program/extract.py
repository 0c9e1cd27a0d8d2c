"""Q/DQ model to integer program.

Nodes are visited in topological order. Each matcher *offers* steps whose integer meaning equals the nodes
they cover; which of them are taken is decided backwards from the graph outputs. What no step covers is
grouped into float islands, so a model is never refused because of a pattern.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array, is_op, node_label, only_consumer, static_shape
from bitwright.compiler.program.affine import quantize
from bitwright.compiler.program.assemble import assemble
from bitwright.compiler.program.draft import Draft, labels
from bitwright.compiler.program.extract_attention import match_attention
from bitwright.compiler.program.extract_dot import match_dot
from bitwright.compiler.program.extract_pointwise import match_add_or_mul, match_average_pool, match_concat
from bitwright.compiler.program.extract_quantizers import (
    channel_params,
    constant_integers,
    tensor_params,
)
from bitwright.compiler.program.extract_tables import match_table
from bitwright.compiler.program.extract_views import (
    match_expand,
    match_identity,
    match_max_pool,
    match_pad,
    match_relu,
    match_reshape,
    match_resize,
    match_slice,
    match_split,
    match_transpose,
)
from bitwright.compiler.program.extract_weight_only import match_nbits, match_product
from bitwright.compiler.program.ops import Program, Quantize, QuantParams, Tensor


def extract_program(model: ir.Model) -> Program:
    """Read the integer program of a Q/DQ model.

    Args:
        model: A valid ONNX model (opset 13 or later) with static shapes. It is not changed; weights of float
            parts are shared with it.

    Returns:
        The program. ``notes`` says why candidates stayed float.

    Raises:
        ModelError: A tensor between two steps has no static shape, or no tensor type.
    """
    work = model.clone()
    _infer_missing_shapes(work)
    _merge_equal_quantizers(work.graph)
    draft = Draft(work)
    for node in work.graph:
        matcher = MATCHERS.get(node.op_type)
        if matcher is not None and is_op(node, node.op_type):
            matcher(draft, node)
        elif node.op_type == "MatMulNBits":
            match_nbits(draft, node)
        elif node.op_type == "GroupQueryAttention":
            match_attention(draft, node)
    return assemble(draft)


def _infer_missing_shapes(model: ir.Model) -> None:
    for value in model.graph.inputs:
        if static_shape(value) is None and value.name not in model.graph.initializers:
            what = "the input's shape is not fixed"
            raise ModelError(
                what,
                where=f"input '{value.name}'",
                fix="give every input dimension a number before the program is extracted",
            )
    outputs = [v for n in model.graph for v in n.outputs if v.name]
    if any(static_shape(v) is None or v.dtype is None for v in outputs):
        ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _merge_equal_quantizers(graph: ir.Graph) -> None:
    """Let all readers of equal Q nodes, and of equal DQ nodes, read the first one."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for node in graph:
        params = channel_params(node)
        if params is None or node.inputs[0] is None:
            continue
        arrays = (params.scale.tobytes(), params.zero_point.tobytes(), params.axis, params.dtype)
        key = (node.op_type, id(node.inputs[0]), *arrays)
        kept = first.setdefault(key, node.outputs[0])
        if kept is not node.outputs[0] and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], kept)


def match_quantizer(draft: Draft, node: ir.Node) -> None:
    """QuantizeLinear that no earlier match ends in: a constant, a table, or a Quantize step."""
    params, value, result = tensor_params(node), node.inputs[0], node.outputs[0]
    if params is None or value is None or result.name in draft.steps:
        return
    output = draft.integer_tensor(result, params)
    floats = constant_array(value)
    if output is None:
        return
    if floats is not None:
        draft.add_constant(output, quantize(floats, params))
    elif not match_table(draft, node, params) and not _quantize_before_moves(draft, node, params):
        _offer_quantize(draft, node, value, output)


def _offer_quantize(draft: Draft, node: ir.Node, value: ir.Value, output: Tensor) -> None:
    step = Quantize(
        name=draft.label(node_label(node)),
        inputs=(value.name or "",),
        outputs=(output.name,),
        nodes=labels(node),
    )
    draft.add(step, output)


def _quantize_before_moves(draft: Draft, node: ir.Node, params: QuantParams) -> bool:
    """Quantize a float value before it is transposed or reshaped: integers are a quarter of the bytes.

    Returns:
        Whether the quantizer's output is offered now.
    """
    value = node.inputs[0]
    moves: list[ir.Node] = []
    while value is not None and only_consumer(value) is not None and is_op(value.producer(), *COMMUTING):
        producer = value.producer()
        assert producer is not None
        moves.insert(0, producer)
        value = producer.inputs[0]
    if not moves or value is None or constant_array(value) is not None:
        return False
    if any(draft.new_tensor("", static_shape(m.outputs[0]), params) is None for m in moves):
        return False
    source = draft.new_tensor(draft.fresh(f"{value.name}_quantized"), static_shape(value), params)
    if source is None:
        return False
    _offer_quantize(draft, node, value, source)
    # Only for the moves of this chain is the value its quantized form; nothing else may see that.
    with draft.pretended_view(value, source):
        for move in moves:
            MATCHERS[move.op_type](draft, move)
    return node.outputs[0].name in draft.steps


def match_dequantizer(draft: Draft, node: ir.Node) -> None:
    """DequantizeLinear of an 8-bit tensor: its output views that tensor."""
    params, value = tensor_params(node), node.inputs[0]
    if params is None or value is None:
        return
    tensor = draft.integer_tensor(value, params)
    if tensor is None:
        return
    array = constant_integers(value)
    if array is not None and tensor.name not in draft.constants:
        draft.add_constant(tensor, np.asarray(array, params.dtype))
    draft.set_view(node.outputs[0], tensor)


COMMUTING = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")

MATCHERS: dict[str, Callable[[Draft, ir.Node], None]] = {
    "QuantizeLinear": match_quantizer,
    "DequantizeLinear": match_dequantizer,
    "Conv": match_dot,
    "MatMul": match_product,
    "Gemm": match_product,
    "Add": match_add_or_mul,
    "Mul": match_add_or_mul,
    "Concat": match_concat,
    "AveragePool": match_average_pool,
    "GlobalAveragePool": match_average_pool,
    "MaxPool": match_max_pool,
    "GlobalMaxPool": match_max_pool,
    "Relu": match_relu,
    "Identity": match_identity,
    "Reshape": match_reshape,
    "Flatten": match_reshape,
    "Squeeze": match_reshape,
    "Unsqueeze": match_reshape,
    "Transpose": match_transpose,
    "Slice": match_slice,
    "Split": match_split,
    "Resize": match_resize,
    "Pad": match_pad,
    "Expand": match_expand,
}
