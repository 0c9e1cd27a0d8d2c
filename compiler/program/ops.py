"""The integer program: what a Q/DQ model computes, as records with exact integer meaning.

One :class:`Program` is read by the numpy reference (``compiler.interpret``), which defines the truth, and by
every backend (``compiler.lower``), which must match it bit for bit. Shapes are logical ONNX shapes (NCHW for
images) and static; the physical layout is the backend's business.

Notation: ``q`` integer tensor, ``s`` float32 scale, ``z`` zero point, ``real = (q - z) * s``. ``rint`` rounds
half to even. ``fma(a, b, c)`` rounds once. ``f32(x)`` rounds to float32. All float arithmetic below is IEEE
float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

# Below this the reciprocal of an activation's magnitude nears the end of float32's range.
SMALLEST_ACTIVATION = 2.0**-100
# 255 * 127 products of a longer group might overflow int32.
LONGEST_GROUP = 65536


@dataclass(frozen=True)
class QuantParams:
    """Per-tensor affine quantization: ``real = (q - zero_point) * scale``.

    Attributes:
        dtype: ``"uint8"`` or ``"int8"``.
        scale: Positive float32 as a Python float (already rounded to float32).
        zero_point: Integer inside the range of ``dtype``.
    """

    dtype: str
    scale: float
    zero_point: int

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and largest integer of ``dtype``."""
        info = np.iinfo(self.dtype)
        return int(info.min), int(info.max)


@dataclass(frozen=True)
class Tensor:
    """A value of the program.

    Attributes:
        name: The tensor's name in the Q/DQ model (the output of QuantizeLinear for integers).
        shape: Logical static shape; every dimension is at least 1.
        dtype: numpy name; for integers with ``quant`` it equals ``quant.dtype``.
        quant: None for float values and for integers that are not quantized (indices, shapes).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    quant: QuantParams | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation.

    Attributes:
        name: Unique label; the ONNX node it came from.
        inputs: Names of the tensors it reads, in order.
        outputs: Names of the tensors it writes.
        nodes: Names of all ONNX nodes that the step covers.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """The only output."""
        (name,) = self.outputs
        return name


@dataclass(frozen=True, kw_only=True)
class Quantize(Step):
    """``q = clip(rint(x / s) + z)``; NaN becomes the lower bound. Float32 in, integer out."""


@dataclass(frozen=True, kw_only=True)
class Dequantize(Step):
    """``x = f32(q - z) * s``. Integer in, float32 out."""


@dataclass(frozen=True, kw_only=True)
class Dot(Step):
    """Shared by Gemm and Conv: exact int32 accumulation over a constant weight, then a fused epilogue.

    ``acc[o] = bias[o] + sum_k (x[k] - zx) * w[o, k]`` exactly in int32 (padding positions count as ``zx``).

    If the output is integer: ``y = clip(rint(f32(acc) * m[o]) + zy, lower, upper)``
    with ``m[o] = f32(f32(sx * sw[o]) / sy)``.
    If the output is float32 (``outputs[0]`` has no quant): ``y = fma(f32(acc), m[o], float_bias[o])`` with
    ``m[o] = f32(sx * sw[o])``, then ``max(y, 0)`` if ``relu`` (``lower``/``upper`` do not apply).

    Attributes:
        weight: int8 array; Gemm: [K, N]; Conv: [O, I/group, KH, KW]. Weight zero point is always 0.
        weight_scale: float32 array [N] or [O].
        bias: int32 array [N] or [O] in units of ``sx * sw[o]``, or None.
        float_bias: float32 array [N] or [O], only for float outputs, or None (0).
        lower: Smallest output integer (a fused Relu or Clip raises it).
        upper: Largest output integer.
        relu: A Relu fused behind a float output.
    """

    weight: np.ndarray
    weight_scale: np.ndarray
    bias: np.ndarray | None = None
    float_bias: np.ndarray | None = None
    lower: int = 0
    upper: int = 255
    relu: bool = False


@dataclass(frozen=True, kw_only=True)
class QGemm(Dot):
    """``x [..., K] @ weight [K, N]``: all leading axes of x are rows."""


@dataclass(frozen=True, kw_only=True)
class QConv(Dot):
    """2-D convolution, NCHW logical. Depthwise when ``group == channels``.

    Attributes:
        strides: (SH, SW).
        pads: (top, left, bottom, right), explicit.
        dilations: (DH, DW).
        group: Divides both channel counts.
    """

    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    group: int = 1


@dataclass(frozen=True, kw_only=True)
class WeightOnlyDot(Step):
    """``x [..., K] @ weight [K, N]``: float activations, weights of few bits in groups along K. Float32 in and out.

    The weight is ``w[k, n] = (u[k, n] - z[g, n]) * s[g, n]`` for ``k`` in group ``g``: ``group`` neighbours each, the
    last group may be short. Activations are rounded to 8 bits, each row of each group with a scale of its own; then
    the group's products are summed exactly, and the groups in rising order by fused multiply-adds::

        top[m, g] = max |x[m, k]| over the group
        a[m, g] = f32(top / 127)                                    NaN if top is infinite or NaN
        r[m, g] = f32(127 / top) if top >= SMALLEST_ACTIVATION else 0
        q[m, k] = rint(f32(x[m, k] * r[m, g]))                      in [-127, 127]
        acc[m, g, n] = sum over the group of q[m, k] * (u[k, n] - z[g, n])            exact int32
        y = bias[n], or 0; then for g = 0, 1, ...: y = fma(f32(acc[m, g, n]), f32(a[m, g] * s[g, n]), y)

    So a row with an infinite or NaN activation becomes NaN, and a group of zeros adds nothing.

    Attributes:
        weight: uint8 [K, N], each in ``[0, 2**bits)``.
        scale: float32 [G, N], finite, G = ceil(K / group).
        zero_point: uint8 [G, N], each in ``[0, 2**bits)``.
        bits: 2, 4 or 8.
        group: Weights along K that share a scale; at most ``LONGEST_GROUP``.
        bias: float32 [N] or None.
    """

    weight: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    bits: int
    group: int
    bias: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class CachedAttention(Step):
    """Causal attention over a cache of fixed capacity that the new rows are written into; float32.

    Reads query [1, T, heads * width], key and value [1, T, key_heads * width], the index of the last position, int32
    [1], and the caches of keys and values, [1, key_heads, capacity, width]; writes the attention's result, shaped as
    the query, and the caches. With ``P = last + 1 - T``, ``r = heads / key_heads`` and ``turn(x, p)`` the rotation of
    each head's halves (x1, x2) to (x1 cos[p] - x2 sin[p], x2 cos[p] + x1 sin[p])::

        keys[h, P + t] = turn(key[t, h], P + t);  values[h, P + t] = value[t, h]         rows beyond capacity: nowhere
        p = softmax over j <= P + t, j > P + t - window, of turn(query[t, g], P + t) . keys[g // r, j] / sqrt(width)
        y[t, g] = sum over j of p[j] * values[g // r, j]

    Sums of floats have no order here: a kernel is compared within a bound, unlike every other step. Rows of the caches
    behind the last position are not read; a kernel writes into the buffers that it was given.

    Attributes:
        heads: Query heads.
        key_heads: Key and value heads, a divisor of ``heads``.
        width: Elements of a head, even.
        cos: float32 [positions, width / 2], at least as many positions as the capacity.
        sin: As ``cos``.
        window: Positions that each sees, its own included; None for all.
    """

    heads: int
    key_heads: int
    width: int
    cos: np.ndarray
    sin: np.ndarray
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class QAdd(Step):
    """Sum of two integer tensors with numpy broadcasting.

    ``ra = f32(sa / sy)``, ``rb = f32(sb / sy)``, ``c = f32(zy - f32(f32(ra * za) + f32(rb * zb)))``,
    ``y = clip(rint(fma(a, ra, fma(b, rb, c))), lower, upper)``.
    """

    lower: int = 0
    upper: int = 255


@dataclass(frozen=True, kw_only=True)
class QMul(Step):
    """Product of two integer tensors with numpy broadcasting.

    ``y = clip(rint(f32((a - za) * (b - zb)) * m) + zy, lower, upper)`` with ``m = f32(f32(sa * sb) / sy)``.
    """

    lower: int = 0
    upper: int = 255


@dataclass(frozen=True, kw_only=True)
class QLut(Step):
    """Any function of one integer tensor, element by element: ``y = table[q - qmin]``.

    Attributes:
        table: 256 entries of the output dtype; index 0 belongs to the smallest integer of the input dtype.
        function: What the table computes, for the report, e.g. ``"Sigmoid"`` or ``"requantize"``.
    """

    table: np.ndarray
    function: str


@dataclass(frozen=True, kw_only=True)
class QConcat(Step):
    """Concatenation along ``axis``; inputs share the output's QuantParams (requantized by QLut before)."""

    axis: int


@dataclass(frozen=True, kw_only=True)
class QPool(Step):
    """2-D pooling, NCHW logical.

    ``kind == "max"``: integer maximum over the window inside the image; input and output share QuantParams.
    ``kind == "average"``: ``t = sum over the window inside the image of (q - zx)`` in int32,
    ``y = clip(rint(f32(t) * f32(f32(sx / sy) / f32(n))) + zy)`` where n counts the elements averaged at that
    output position (the whole kernel with ``count_include_pad``).

    Attributes:
        kernel: (KH, KW); global pooling has the image size here.
        strides: (SH, SW).
        pads: (top, left, bottom, right).
        dilations: (DH, DW), for max only.
        count_include_pad: ONNX AveragePool attribute.
    """

    kind: str
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    count_include_pad: bool = False


@dataclass(frozen=True, kw_only=True)
class Move(Step):
    """Moves integers without changing them; output QuantParams equal the input's.

    Attributes:
        kind: ``"reshape"`` (also Flatten, Squeeze, Unsqueeze), ``"transpose"``, ``"slice"``,
            ``"resize_nearest"``, ``"pad"``, ``"expand"``.
        perm: For transpose.
        starts: For slice: one per axis, non-negative.
        steps: For slice: one per axis, positive or negative.
        indices: For resize_nearest: one int64 array an axis, the input index each output index reads.
        pads: For pad: (before..., after...), filled with ``fill``.
        fill: For pad: the integer written outside.
    """

    kind: str
    perm: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    indices: tuple[np.ndarray, ...] = ()
    pads: tuple[int, ...] = ()
    fill: int = 0


@dataclass(frozen=True, kw_only=True)
class FloatIsland(Step):
    """A part of the model that stays as ONNX nodes (float, or integer index arithmetic).

    Attributes:
        model: A self-contained ONNX model with the step's inputs and outputs, static shapes.
    """

    model: ir.Model


@dataclass(frozen=True)
class Program:
    """A whole model at fixed shapes.

    Attributes:
        inputs: Graph input names, in order.
        outputs: Graph output names, in order.
        steps: In topological order.
        tensors: Every tensor that crosses a step boundary, by name.
        constants: Tensors that no step writes and nobody feeds: constant operands of steps, constant graph
            outputs.
        notes: One line for each "why not" of the extraction, e.g. why a convolution stayed float.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tensor(self, name: str) -> Tensor:
        """Return the named tensor."""
        return self.tensors[name]
