"""Add, Mul, Concat and average pooling between quantizers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import int_attribute, is_op, node_label, static_shape
from bitwright.compiler.program.affine import all_integers, dequantize, quantize
from bitwright.compiler.program.draft import Draft, labels
from bitwright.compiler.program.extract_window import pool_kernel, window_of
from bitwright.compiler.program.ops import QAdd, QConcat, QLut, QMul, QPool, QuantParams, Tensor


def match_add_or_mul(draft: Draft, node: ir.Node) -> None:
    """Offer a QAdd or QMul when both operands are quantized tensors and a quantizer follows."""
    a, b = draft.view(node.inputs[0]), draft.view(node.inputs[1])
    end = draft.quantized_end(node.outputs[0])
    if a is None or b is None or end is None or a.quant is None or b.quant is None:
        return
    constants = [t for t in (a, b) if t.name in draft.constants]
    # One element against a tensor is a function of one integer: a table is exact and cheaper.
    if len(constants) == 2 or any(t.shape.count(1) == len(t.shape) for t in constants):
        return
    if np.broadcast_shapes(a.shape, b.shape) != end.output.shape:
        return
    kind = QAdd if is_op(node, "Add") else QMul
    if not _finite_factors(kind, a.quant, b.quant, end.quant):
        draft.note(node, "its scales are too far apart for float32")
        return
    step = kind(
        name=draft.label(node_label(node)),
        inputs=(a.name, b.name),
        outputs=(end.output.name,),
        nodes=labels(node, *end.nodes),
        lower=end.lower,
        upper=end.upper,
    )
    draft.add(step, end.output)


def _finite_factors(kind: type[QAdd] | type[QMul], a: QuantParams, b: QuantParams, y: QuantParams) -> bool:
    sa, sb, sy = np.float32(a.scale), np.float32(b.scale), np.float32(y.scale)
    with np.errstate(over="ignore"):
        factors = [sa / sy * 256, sb / sy * 256] if kind is QAdd else [sa * sb / sy * 65536]
    return bool(np.all(np.isfinite(factors)))


def match_concat(draft: Draft, node: ir.Node) -> None:
    """Offer a QConcat; inputs whose parameters differ from the output's are requantized first."""
    views = [draft.view(v) for v in node.inputs]
    tensors = [t for t in views if t is not None]
    if len(tensors) < len(views) or all(t.name in draft.constants for t in tensors):
        return
    shape = static_shape(node.outputs[0])
    if shape is None:
        return
    end = draft.quantized_end(node.outputs[0])
    fused = end is not None and len(end.nodes) == 1
    params = {t.quant for t in tensors}
    if fused and end is not None:
        output: Tensor | None = end.output
    elif len(params) == 1 and (quant := tensors[0].quant) is not None:
        output = draft.viewed_output(node.outputs[0], quant)
    else:
        return
    if output is None or output.quant is None:
        return
    quant = output.quant
    inputs = tuple(requantized(draft, t, quant, node).name for t in tensors)
    axis = int_attribute(node, "axis", 0) % len(shape)
    covered = labels(node, *(end.nodes if fused and end is not None else ()))
    name = draft.label(node_label(node))
    draft.add(QConcat(name=name, inputs=inputs, outputs=(output.name,), nodes=covered, axis=axis), output)
    if not fused:
        draft.set_view(node.outputs[0], output)


def requantized(draft: Draft, tensor: Tensor, params: QuantParams, node: ir.Node) -> Tensor:
    """Return ``tensor`` in other parameters: itself, a folded constant, or the output of a table."""
    assert tensor.quant is not None
    if tensor.quant == params:
        return tensor
    stem = f"{tensor.name}_as_{params.dtype}_{params.scale:g}_{params.zero_point}"
    known = draft.tensors.get(stem)
    if known is not None and known.quant == params:
        return known
    name = stem if known is None else draft.fresh(stem)
    output = Tensor(name, tensor.shape, params.dtype, params)
    if tensor.name in draft.constants:
        draft.add_constant(output, quantize(dequantize(draft.constants[tensor.name], tensor.quant), params))
        return output
    table = quantize(dequantize(all_integers(tensor.quant), tensor.quant), params)
    label = draft.label(f"{node_label(node)}_requantize")
    step = QLut(name=label, inputs=(tensor.name,), outputs=(name,), table=table, function="requantize")
    draft.add(step, output)
    return output


def match_average_pool(draft: Draft, node: ir.Node) -> None:
    """Offer an average QPool when a quantizer follows directly."""
    x = draft.variable_view(node.inputs[0])
    end = draft.quantized_end(node.outputs[0])
    if x is None or end is None or len(end.nodes) != 1 or len(x.shape) != 4:
        return
    image = (x.shape[2], x.shape[3])
    window = window_of(node, pool_kernel(node, image), image)
    if window is None or window.dilations != (1, 1):
        return
    size = (end.output.shape[2], end.output.shape[3])
    if window.output_size(image) != size or not window.always_inside(image, size):
        draft.note(node, "ceil_mode adds windows beyond the padded image")
        return
    step = QPool(
        name=draft.label(node_label(node)),
        inputs=(x.name,),
        outputs=(end.output.name,),
        nodes=labels(node, *end.nodes),
        kind="average",
        kernel=window.kernel,
        strides=window.strides,
        pads=window.pads,
        count_include_pad=int_attribute(node, "count_include_pad", 0) != 0,
    )
    draft.add(step, end.output)
