"""From real ranges to scales and zero points."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.errors import InternalError
from bitwright.targets.schema import QSpace

# Below this a float32 division by the scale overflows for values of order one, and denormal scales lose precision.
SMALLEST_SCALE = float(np.float32(2.0**-100))

# Largest finite values of the 8-bit floating point types.
FLOAT8_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}

# Half of int32: the bias may take one half, the accumulated products the other.
BIAS_LIMIT = 2**30


def integer_dtype(space: QSpace) -> str:
    """Return the numpy name of the integers of a qspace, e.g. ``"uint8"``."""
    if space.float_type is not None:
        msg = "a float qspace has no integer type"
        raise InternalError(msg)
    return f"{'int' if space.signed else 'uint'}{space.bits}"


_CODEBOOK_TYPES = {
    "nf4": "uint4",
    "ternary": "int2",
    "binary": "int2",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
}


def stored_dtype(space: QSpace) -> str:
    """Return the element type that weights of a qspace have in the file, e.g. ``"int4"``."""
    if space.float_type is not None:
        return {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}[space.float_type]
    if space.codebook is not None and space.stored_bits is None:
        return _CODEBOOK_TYPES[space.codebook]
    return f"{'int' if space.signed else 'uint'}{space.stored_bits or space.bits}"


def activation_params(low: float, high: float, space: QSpace) -> tuple[str, float, int]:
    """Return (dtype, scale, zero_point) that covers ``[low, high]`` and represents 0 exactly.

    The range is widened to contain 0 (padding and Relu need an exact zero). An empty range gets scale 1.
    """
    if space.codebook is not None:
        return stored_dtype(space), _scale(max(-low, high), FLOAT8_LARGEST[space.codebook]), 0
    dtype = integer_dtype(space)
    info = np.iinfo(dtype)
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if space.symmetric:
        bound = max(-low, high)
        middle = 0 if space.signed else (int(info.max) + 1) // 2
        return dtype, _scale(bound, int(info.max) - middle), middle
    scale = _scale(high - low, int(info.max) - int(info.min))
    zero_point = int(np.clip(np.rint(info.min - low / scale), info.min, info.max))
    return dtype, scale, zero_point


def _scale(extent: float, steps: float) -> float:
    if extent == 0.0:
        return 1.0
    return max(float(np.float32(extent / steps)), SMALLEST_SCALE)


def weight_scale(weight: np.ndarray, axis: int | None, space: QSpace) -> np.ndarray:
    """Return symmetric scales ``max|w| / 127`` as float32, one per index of ``axis`` (or one for the tensor).

    Weights of two or three values get the scale of least square error.
    Channels of zeros get scale 1: their integers are zero whatever the scale.
    """
    if space.codebook in ("ternary", "binary"):
        rows = (
            weight.reshape(1, -1)
            if axis is None
            else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
        )
        few = _few_levels_scale(rows, 1, rows.shape[1], zero=space.codebook == "ternary")
        return _not_zero(few.reshape(-1))
    largest = largest_value(space)
    others = tuple(k for k in range(weight.ndim) if k != axis)
    over = others if axis is not None else None
    # Not max(abs(w)), which would copy the weight.
    bound = np.maximum(weight.max(axis=over, initial=0.0), -weight.min(axis=over, initial=0.0))
    return _not_zero(np.asarray(bound, np.float32).reshape(-1) / np.float32(largest))


def _not_zero(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, np.float32(1.0), np.maximum(scale, np.float32(SMALLEST_SCALE)))


def _usable(scale: np.ndarray) -> np.ndarray:
    """Return scales of groups: kernels leave a trace of the scale where a group is all zeros, so it is tiny there."""
    usable: np.ndarray = np.maximum(scale, np.float32(SMALLEST_SCALE))
    return usable


def largest_value(space: QSpace) -> float:
    """Return the largest magnitude a weight may have in steps of its scale (on both sides of zero)."""
    if space.codebook is not None:
        return FLOAT8_LARGEST.get(space.codebook, 1.0)
    return float(2 ** (space.bits - 1) - 1) if space.bits > 1 else 1.0


def grouped_scale(
    weight: np.ndarray, axis: int, group: int, space: QSpace
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return max-abs scales (and zero points if the qspace is asymmetric) of groups along ``axis`` of a matrix.

    Args:
        weight: float32, rank 2.
        axis: The axis that is cut into groups; the last group may be short.
        group: Weights of a group.
        space: A qspace with granularity ``group``.

    Returns:
        Scales, and integers of the same shape or None: the weight's shape with ``axis`` divided by ``group``.
    """
    length = weight.shape[axis]
    starts = np.arange(0, length, group)
    high = np.maximum.reduceat(weight, starts, axis=axis)
    low = np.minimum.reduceat(weight, starts, axis=axis)
    if space.codebook in ("ternary", "binary"):
        return _usable(_few_levels_scale(weight, axis, group, zero=space.codebook == "ternary")), None
    if space.symmetric or space.codebook is not None:
        return _usable(np.maximum(high, -low).astype(np.float32) / np.float32(largest_value(space))), None
    high, low = np.maximum(high, 0), np.minimum(low, 0)
    scale = _usable((high - low).astype(np.float32) / np.float32(2**space.bits - 1))
    smallest = -(2 ** (space.bits - 1)) if space.signed else 0
    zero = np.clip(np.rint(smallest - low / scale), smallest, smallest + 2**space.bits - 1)
    return scale, zero.astype(np.int8 if space.signed else np.uint8)


def _few_levels_scale(weight: np.ndarray, axis: int, group: int, *, zero: bool) -> np.ndarray:
    """Return the scales of least square error for weights -s and s, and 0 if ``zero``.

    Of ``n`` weights of which the ``k`` largest magnitudes become s and the others 0, s is best at their mean and the
    error is the sum of squares less ``(sum of the k)^2 / k``; without zero, k = n (Rastegari et al. 2016,
    "XNOR-Net", section 3.1; Li et al. 2016, "Ternary Weight Networks", equation 5, solved over all k).
    """
    length = weight.shape[axis]
    blocks = -(-length // group)
    magnitude = np.abs(np.moveaxis(weight, axis, 0)).astype(np.float32)
    padded = np.zeros((blocks * group, magnitude.shape[1]), np.float32)
    padded[:length] = magnitude
    each = padded.reshape(blocks, group, -1)
    if zero:
        sums = np.cumsum(-np.sort(-each, axis=1), axis=1, dtype=np.float64)
        counts = np.arange(1, group + 1)[:, None]
        best = (sums**2 / counts).argmax(axis=1)[:, None]
        scale = (np.take_along_axis(sums, best, 1) / (best + 1))[:, 0]
    else:
        members = np.minimum(length - np.arange(blocks) * group, group)
        scale = each.sum(axis=1, dtype=np.float64) / members[:, None]
    return np.moveaxis(scale.astype(np.float32), 0, axis)


def widen_for_bias(scale: np.ndarray, bias: np.ndarray, input_scale: float) -> np.ndarray:
    """Return weight scales enlarged where ``bias / (input_scale * scale)`` would not fit half of int32.

    A bias that overflows int32 wraps around silently in every runtime; a slightly coarser weight does not.
    """
    needed = np.abs(bias.reshape(-1)).astype(np.float64) / (input_scale * BIAS_LIMIT)
    enlarged: np.ndarray = np.maximum(scale, needed.astype(np.float32)).astype(np.float32)
    return enlarged


def levels_of(bits: int) -> int:
    """Return the number of integers of a width."""
    return int(2**bits)
