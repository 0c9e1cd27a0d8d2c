"""Nodes that move or select dequantized values: the same nodes on integers are exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, int_attribute, is_op, node_label, static_shape
from bitwright.compiler.program.affine import all_integers, dequantize, quantize
from bitwright.compiler.program.draft import Draft, labels
from bitwright.compiler.program.extract_resize import nearest_indices
from bitwright.compiler.program.extract_window import pool_kernel, window_of
from bitwright.compiler.program.ops import Move, QLut, QPool, QuantParams, Step, Tensor


def _source(draft: Draft, node: ir.Node) -> tuple[Tensor, QuantParams] | None:
    x = draft.variable_view(node.inputs[0])
    return None if x is None or x.quant is None else (x, x.quant)


def _offer(draft: Draft, step: Step, value: ir.Value, output: Tensor) -> None:
    draft.add(step, output)
    draft.set_view(value, output)


def _move(draft: Draft, node: ir.Node, value: ir.Value, kind: Move) -> None:
    """Offer ``kind`` (a Move with its own fields set) from the view of input 0 to ``value``."""
    source = _source(draft, node)
    output = None if source is None else draft.viewed_output(value, source[1])
    if source is None or output is None:
        return
    step = replace(
        kind,
        name=draft.label(node_label(node)),
        inputs=(source[0].name,),
        outputs=(output.name,),
        nodes=labels(node),
    )
    _offer(draft, step, value, output)


def _template(kind: str) -> Move:
    return Move(name="", inputs=(), outputs=(), kind=kind)


def match_identity(draft: Draft, node: ir.Node) -> None:
    """Identity: the output has the view of the input."""
    source = draft.view(node.inputs[0])
    if source is not None:
        draft.set_view(node.outputs[0], source)


def match_reshape(draft: Draft, node: ir.Node) -> None:
    """Reshape, Flatten, Squeeze, Unsqueeze: only the static output shape matters."""
    _move(draft, node, node.outputs[0], _template("reshape"))


def match_transpose(draft: Draft, node: ir.Node) -> None:
    """Transpose with its default permutation resolved."""
    source = _source(draft, node)
    if source is not None:
        backwards = tuple(reversed(range(len(source[0].shape))))
        perm = node.attributes.get_ints("perm", None)
        move = replace(_template("transpose"), perm=backwards if perm is None else tuple(perm))
        _move(draft, node, node.outputs[0], move)


def match_expand(draft: Draft, node: ir.Node) -> None:
    """Expand to the static output shape."""
    _move(draft, node, node.outputs[0], _template("expand"))


def match_slice(draft: Draft, node: ir.Node) -> None:
    """Slice with constant bounds."""
    source = _source(draft, node)
    arrays = [constant_array(v) if v is not None else None for v in node.inputs[1:]]
    given = [a for v, a in zip(node.inputs[1:], arrays, strict=True) if v is not None]
    if source is None or len(arrays) < 2 or any(a is None for a in given):
        return
    shape = source[0].shape
    fields = [None if a is None else [int(e) for e in a.reshape(-1)] for a in (*arrays, None, None)]
    starts, ends = fields[0], fields[1]
    assert starts is not None and ends is not None
    axes = fields[2] or list(range(len(starts)))
    steps = fields[3] or [1] * len(starts)
    first, stride = [0] * len(shape), [1] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # ONNX counts an end below -dim as "through element 0" when stepping back, as Python slices do.
        first[axis % len(shape)] = slice(start, end, step).indices(shape[axis % len(shape)])[0]
        stride[axis % len(shape)] = step
    move = replace(_template("slice"), starts=tuple(first), steps=tuple(stride))
    _move(draft, node, node.outputs[0], move)


def match_split(draft: Draft, node: ir.Node) -> None:
    """Split: one slice an output."""
    source = _source(draft, node)
    if source is None:
        return
    dims = len(source[0].shape)
    axis, start = int_attribute(node, "axis", 0) % dims, 0
    for value in node.outputs:
        shape = static_shape(value)
        if shape is None:
            return
        starts = tuple(start if d == axis else 0 for d in range(dims))
        if value.name:
            _move(draft, node, value, replace(_template("slice"), starts=starts, steps=(1,) * dims))
        start += shape[axis]


def match_resize(draft: Draft, node: ir.Node) -> None:
    """Resize with mode nearest: input indices are computed here."""
    source = _source(draft, node)
    shape = static_shape(node.outputs[0])
    if source is None or shape is None or 0 in shape:
        return
    indices = nearest_indices(node, source[0].shape, shape)
    if indices is None:
        draft.note(node, "only nearest interpolation without cropping is done on integers")
        return
    _move(draft, node, node.outputs[0], replace(_template("resize_nearest"), indices=indices))


def match_pad(draft: Draft, node: ir.Node) -> None:
    """Pad with a constant that the quantized type represents exactly."""
    source = _source(draft, node)
    pads = constant_array(node.inputs[1])
    if source is None or pads is None or node.attributes.get_string("mode", "constant") != "constant":
        return
    value, axes = (constant_array(v) for v in (*node.inputs[2:4], *(None,) * (4 - len(node.inputs))))
    if any(
        i < len(node.inputs) and node.inputs[i] is not None and a is None for i, a in ((2, value), (3, axes))
    ):
        return
    fill = _exact_integer(0.0 if value is None else float(value.reshape(-1)[0]), source[1])
    full = _full_pads(pads, axes, len(source[0].shape))
    if fill is None or min(full) < 0:
        draft.note(node, "the padding value is not a quantized value, or padding is negative")
        return
    _move(draft, node, node.outputs[0], replace(_template("pad"), pads=full, fill=fill))


def _exact_integer(value: float, params: QuantParams) -> int | None:
    integer = quantize(np.array(value, np.float32), params)
    return int(integer) if dequantize(integer, params) == np.float32(value) else None


def _full_pads(pads: np.ndarray, axes: np.ndarray | None, dims: int) -> tuple[int, ...]:
    chosen = range(dims) if axes is None else [int(a) % dims for a in axes.reshape(-1)]
    full, half = [0] * (2 * dims), pads.size // 2
    for i, axis in enumerate(chosen):
        full[axis], full[axis + dims] = int(pads[i]), int(pads[i + half])
    return tuple(full)


def match_max_pool(draft: Draft, node: ir.Node) -> None:
    """MaxPool and GlobalMaxPool: dequantization is monotone, so the maximum may be taken on integers."""
    source = _source(draft, node)
    shape = static_shape(node.outputs[0])
    if source is None or shape is None or len(shape) != 4 or len(source[0].shape) != 4:
        return
    if len([o for o in node.outputs if o.name and (o.uses() or o.is_graph_output())]) > 1:
        draft.note(node, "its index output is used")
        return
    image, size = (source[0].shape[2], source[0].shape[3]), (shape[2], shape[3])
    window = window_of(node, pool_kernel(node, image), image)
    if window is None:
        return
    # ceil_mode reads further right and below; for a maximum that is only more padding.
    extra = [(size[a] - 1) * window.strides[a] + window.reach(a) - image[a] - window.pads[a] for a in (0, 1)]
    bottom, right = (max(extra[a], window.pads[a + 2]) for a in (0, 1))
    window = replace(window, pads=(window.pads[0], window.pads[1], bottom, right))
    output = draft.viewed_output(node.outputs[0], source[1])
    if output is None or window.output_size(image) != size or not window.always_inside(image, size):
        return
    step = QPool(
        name=draft.label(node_label(node)),
        inputs=(source[0].name,),
        outputs=(output.name,),
        nodes=labels(node),
        kind="max",
        kernel=window.kernel,
        strides=window.strides,
        pads=window.pads,
        dilations=window.dilations,
    )
    _offer(draft, step, node.outputs[0], output)


def match_relu(draft: Draft, node: ir.Node) -> None:
    """Relu without a quantizer of its own: ``max(q, z)`` keeps the parameters."""
    source = _source(draft, node)
    if source is None or any(is_op(u.node, "QuantizeLinear") for u in node.outputs[0].uses()):
        return
    output = draft.viewed_output(node.outputs[0], source[1])
    if output is None:
        return
    table = np.maximum(all_integers(source[1]), source[1].zero_point).astype(source[1].dtype)
    step = QLut(
        name=draft.label(node_label(node)),
        inputs=(source[0].name,),
        outputs=(output.name,),
        nodes=labels(node),
        table=table,
        function="Relu",
    )
    _offer(draft, step, node.outputs[0], output)
