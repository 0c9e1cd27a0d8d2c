"""Conv, MatMul and Gemm over dequantized inputs become QConv and QGemm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import (
    int_attribute,
    is_op,
    node_label,
    only_consumer,
    static_shape,
)
from bitwright.compiler.program.draft import Draft, QuantizedEnd, labels
from bitwright.compiler.program.extract_quantizers import constant_real, quantized_constant
from bitwright.compiler.program.extract_window import window_of
from bitwright.compiler.program.ops import Dot, QConv, QGemm, QuantParams, Tensor

INT32_MAX = 2**31 - 1
# A float bias is rounded to units of sx * sw when the output is integer. Half a unit may then move the result
# by at most this share of an output step; otherwise the operator keeps a float output and adds the bias
# exactly.
BIAS_ROUNDING_LIMIT = 1 / 16
# Tools compute the bias scale in float32 or float64; a relative difference below this is the same scale.
SCALE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Linear:
    """One matched product.

    Attributes:
        x: The integer activation.
        weight: int8 array in the layout of the step.
        scale: float32 [channels].
        bias: The int32 bias [channels] and its float32 scales [channels], when it is stored as integers.
        float_bias: float32 [channels], when it is not.
        kind: QGemm or QConv.
        geometry: Further fields of the step.
        nodes: Covered nodes.
    """

    x: Tensor
    weight: np.ndarray
    scale: np.ndarray
    bias: tuple[np.ndarray, np.ndarray] | None
    float_bias: np.ndarray | None
    kind: type[QGemm] | type[QConv]
    geometry: dict[str, Any]
    nodes: tuple[ir.Node | None, ...]

    @property
    def product_scale(self) -> np.ndarray:
        """``f32(sx * sw[o])``."""
        return np.float32(_quant(self.x).scale) * self.scale

    @property
    def has_bias(self) -> bool:
        """Whether the node itself has a bias."""
        return self.bias is not None or self.float_bias is not None


def _quant(tensor: Tensor) -> QuantParams:
    assert tensor.quant is not None
    return tensor.quant


def match_dot(draft: Draft, node: ir.Node) -> None:
    """Offer a QConv or QGemm for ``node``, with integer output where a quantizer follows, else float."""
    linear = _conv(draft, node) if node.op_type == "Conv" else _gemm(draft, node)
    if linear is None:
        return
    value = node.outputs[0]
    linear, value = _absorb_add(linear, value)
    end = draft.quantized_end(value)
    step = None if end is None else _integer_step(draft, node, linear, end)
    if step is not None and end is not None:
        draft.add(step, end.output)
        return
    _offer_float(draft, node, linear, value)


def _weight(value: ir.Value | None, axis: int, ndim: int) -> tuple[np.ndarray, np.ndarray, ir.Node] | None:
    """Return int8 weight, float32 scale per channel of ``axis`` and the DQ node."""
    found = quantized_constant(value)
    if found is None or found.integers.ndim != ndim or (found.scale.size > 1 and found.axis != axis):
        return None
    if found.integers.size == 0 or found.integers.min() < -128 or found.integers.max() > 127:
        return None
    scale = np.broadcast_to(found.scale, (found.integers.shape[axis],)).astype(np.float32)
    return found.integers.astype(np.int8), scale, found.node


def _bias(value: ir.Value | None, channels: int) -> tuple[Any, Any, ir.Node | None] | None:
    """Return (int32 bias with its scales, float bias, DQ node), parts of it None; None if unfit."""
    if value is None:
        return None, None, None
    found = quantized_constant(value)
    if (
        found is not None
        and found.integers.shape == (channels,)
        and np.abs(found.integers).max() <= INT32_MAX
    ):
        return (found.integers, np.broadcast_to(found.scale, (channels,))), None, found.node
    real = constant_real(value)
    if real is None or (real.size not in (1, channels)) or real.shape[:-1].count(1) != len(real.shape[:-1]):
        return None
    node = None if found is None else found.node
    return None, np.ascontiguousarray(np.broadcast_to(real.reshape(-1), (channels,))), node


def _gemm(draft: Draft, node: ir.Node) -> Linear | None:
    x = draft.variable_view(node.inputs[0])
    if x is None or len(x.shape) < 2:
        return None
    transposed = is_op(node, "Gemm") and int_attribute(node, "transB", 0) != 0
    if is_op(node, "Gemm") and not _plain_gemm(node):
        draft.note(node, "alpha, beta or transA is not the default")
        return None
    weight = _weight(node.inputs[1], 0 if transposed else 1, 2)
    if weight is None:
        return None
    array = np.ascontiguousarray(weight[0].T) if transposed else weight[0]
    bias = _bias(node.inputs[2] if len(node.inputs) > 2 else None, array.shape[1])
    if bias is None:
        draft.note(node, "its bias is not a constant vector")
        return None
    return Linear(x, array, weight[1], bias[0], bias[1], QGemm, {}, (weight[2], bias[2], node))


def _plain_gemm(node: ir.Node) -> bool:
    attributes = node.attributes
    unit = attributes.get_float("alpha", 1.0) == 1.0 and attributes.get_float("beta", 1.0) == 1.0
    return unit and int_attribute(node, "transA", 0) == 0


def _conv(draft: Draft, node: ir.Node) -> Linear | None:
    x = draft.variable_view(node.inputs[0])
    weight = _weight(node.inputs[1], 0, 4)
    if x is None or weight is None or len(x.shape) != 4:
        return None
    window = window_of(node, weight[0].shape[2:], (x.shape[2], x.shape[3]))
    bias = _bias(node.inputs[2] if len(node.inputs) > 2 else None, weight[0].shape[0])
    if window is None or bias is None:
        draft.note(node, "its padding is negative or its bias is not a constant vector")
        return None
    geometry = {
        "strides": window.strides,
        "pads": window.pads,
        "dilations": window.dilations,
        "group": int_attribute(node, "group", 1),
    }
    return Linear(x, weight[0], weight[1], bias[0], bias[1], QConv, geometry, (weight[2], bias[2], node))


def _absorb_add(linear: Linear, value: ir.Value) -> tuple[Linear, ir.Value]:
    """Take the constant vector of a following Add as the bias of a product that has none."""
    add = only_consumer(value)
    if linear.kind is not QGemm or linear.has_bias or add is None or not is_op(add, "Add"):
        return linear, value
    other = add.inputs[1] if add.inputs[0] is value else add.inputs[0]
    real = None if other is value else constant_real(other)
    channels = linear.weight.shape[1]
    if real is None or real.shape[:-1].count(1) != len(real.shape[:-1]) or real.size not in (1, channels):
        return linear, value
    if static_shape(add.outputs[0]) != static_shape(value):
        return linear, value
    vector = np.ascontiguousarray(np.broadcast_to(real.reshape(-1), (channels,)))
    dequantizer = quantized_constant(other)
    nodes = (*linear.nodes, None if dequantizer is None else dequantizer.node, add)
    return replace(linear, float_bias=vector, nodes=nodes), add.outputs[0]


def _exact_bias(linear: Linear) -> np.ndarray | None:
    """Return the stored integer bias if its scale is ``sx * sw``, else None."""
    if linear.bias is None:
        return None
    integers, scale = linear.bias
    same = np.allclose(scale, linear.product_scale, rtol=SCALE_TOLERANCE, atol=0)
    return integers if same else None


def _real_bias(linear: Linear) -> np.ndarray | None:
    """Return the bias as float32, None without bias."""
    if linear.bias is None:
        return linear.float_bias
    integers, scale = linear.bias
    return np.asarray(integers.astype(np.float32) * scale, np.float32)


def _rounded_bias(linear: Linear, sy: float) -> np.ndarray | None:
    """Return a float bias in units of ``sx * sw``; None if rounding it would be visible in the output."""
    real, unit = _real_bias(linear), linear.product_scale.astype(np.float64)
    if real is None or np.any(unit == 0) or np.any(unit / sy * 0.5 > BIAS_ROUNDING_LIMIT):
        return None
    rounded = np.rint(real.astype(np.float64) / unit)
    return rounded.astype(np.int64) if np.all(np.abs(rounded) <= INT32_MAX) else None


def _fits(linear: Linear, bias: np.ndarray | None) -> bool:
    """Tell whether no input can make the int32 accumulator overflow."""
    quant = _quant(linear.x)
    low, high = quant.bounds
    largest = max(quant.zero_point - low, high - quant.zero_point)
    axes = (0,) if linear.kind is QGemm else (1, 2, 3)
    total = np.abs(linear.weight.astype(np.int64)).sum(axis=axes) * largest
    if bias is not None:
        total = total + np.abs(bias)
    return bool(np.all(total <= INT32_MAX))


def _integer_step(draft: Draft, node: ir.Node, linear: Linear, end: QuantizedEnd) -> Dot | None:
    bias = _exact_bias(linear)
    if bias is None and linear.has_bias:
        bias = _rounded_bias(linear, end.quant.scale)
        if bias is None:
            return None
    with np.errstate(over="ignore"):
        factor = linear.product_scale / np.float32(end.quant.scale)
    if not np.all(np.isfinite(factor)) or not _fits(linear, bias):
        return None
    return linear.kind(
        name=draft.label(node_label(node)),
        inputs=(linear.x.name,),
        outputs=(end.output.name,),
        nodes=labels(*linear.nodes, *end.nodes),
        weight=linear.weight,
        weight_scale=linear.scale,
        bias=None if bias is None else bias.astype(np.int32),
        lower=end.lower,
        upper=end.upper,
        **linear.geometry,
    )


def _offer_float(draft: Draft, node: ir.Node, linear: Linear, value: ir.Value) -> None:
    bias = _exact_bias(linear)
    if not _fits(linear, bias):
        draft.note(node, "the int32 accumulator could overflow")
        return
    follower = only_consumer(value)
    relu = follower if follower is not None and is_op(follower, "Relu") else None
    output = value if relu is None else relu.outputs[0]
    shape = static_shape(output)
    if shape is None or 0 in shape or output.name is None:
        return
    step = linear.kind(
        name=draft.label(node_label(node)),
        inputs=(linear.x.name,),
        outputs=(output.name,),
        nodes=labels(*linear.nodes, relu),
        weight=linear.weight,
        weight_scale=linear.scale,
        bias=None if bias is None else bias.astype(np.int32),
        float_bias=_real_bias(linear) if bias is None else None,
        relu=relu is not None,
        **linear.geometry,
    )
    draft.add(step, Tensor(output.name, shape, "float32"))
