"""Functions of one tensor: which TFLite operator stands for a table, and what its reference kernel computes.

The integer program knows a function as 256 integers. The operator is the one whose kernel writes the same integers, or
neighbours of them: kernels round more often than the table does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.interpret.fixed_point import GEMMLOWP_BITS, fixed_point, requantize
from bitwright.compiler.program.affine import all_integers
from bitwright.compiler.program.ops import QuantParams
from bitwright.targets.ethos_u.tflite_graph import OptionValue

Integers = NDArray[np.int64]
# A kernel that rounds twice may be one integer off.
TOLERANCE = 1
SIXTEEN = 2**15


@dataclass(frozen=True)
class LookUp:
    """An operator of one tensor.

    Attributes:
        operator: Its name.
        table: int8 [256], what it writes for the integers from -128 on.
        options_type, options, version: As in :class:`~bitwright.targets.ethos_u.tflite_graph.Layer`.
    """

    operator: str
    table: np.ndarray
    options_type: str = ""
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    version: int = 1


def operator_for(
    table: np.ndarray, x: QuantParams, y: QuantParams, slopes: tuple[float, ...]
) -> LookUp | None:
    """Return the operator that computes a table, or None.

    Args:
        table: int8 [256].
        x: Parameters of the input.
        y: Of the output.
        slopes: Candidates for the slope of a LeakyRelu.
    """
    best, fewest = None, 257
    for candidate in _candidates(x, y, slopes):
        difference = np.abs(candidate.table.astype(np.int64) - table)
        if difference.max() <= TOLERANCE and np.count_nonzero(difference) < fewest:
            best, fewest = candidate, int(np.count_nonzero(difference))
    return best


def _candidates(x: QuantParams, y: QuantParams, slopes: tuple[float, ...]) -> Iterator[LookUp]:
    yield LookUp("QUANTIZE", _int8(_rescaled(_centred(x), _ratio64(x, y), y), y), version=2)
    yield LookUp("RELU", _clipped(x, y, 0.0, np.inf), version=2)
    yield LookUp("RELU6", _clipped(x, y, 0.0, 6.0), version=2)
    yield LookUp("RELU_N1_TO_1", _clipped(x, y, -1.0, 1.0))
    if (y.scale, y.zero_point) == (1 / 256, -128):
        yield LookUp("LOGISTIC", _of_float(lambda v: 1 / (1 + np.exp(-v)), x, y), version=2)
    if (y.scale, y.zero_point) == (1 / 128, 0):
        yield LookUp("TANH", _of_float(np.tanh, x, y), version=2)
    for slope in slopes:
        options = {"alpha": float(np.float32(slope))}
        yield LookUp("LEAKY_RELU", _leaky(x, y, slope), "LeakyReluOptions", options, 2)
    curved = _hard_swish(x, y)
    if curved is not None:
        yield LookUp("HARD_SWISH", curved)


def _centred(x: QuantParams) -> Integers:
    return all_integers(x).astype(np.int64) - x.zero_point


def _ratio64(x: QuantParams, y: QuantParams) -> float:
    return float(np.float32(x.scale)) / float(np.float32(y.scale))


def _ratio32(x: QuantParams, y: QuantParams) -> float:
    return float(np.float32(x.scale) / np.float32(y.scale))


def _rescaled(centred: Integers, factor: float, y: QuantParams) -> Integers:
    return requantize(centred, fixed_point(factor, GEMMLOWP_BITS), "double") + y.zero_point


def _int8(values: np.ndarray, y: QuantParams) -> np.ndarray:
    clipped: np.ndarray = np.clip(values, *y.bounds).astype(np.int8)
    return clipped


def _clipped(x: QuantParams, y: QuantParams, low: float, high: float) -> np.ndarray:
    """RELU and its kin: bounds are rounded to integers of the output."""
    values = _rescaled(_centred(x), _ratio32(x, y), y)
    least = y.zero_point + _half_away(np.float32(low) / np.float32(y.scale))
    most = y.zero_point + _half_away(np.float32(high) / np.float32(y.scale)) if np.isfinite(high) else 127
    return _int8(np.clip(values, max(least, -128), min(most, 127)), y)


def _half_away(value: np.float32) -> int:
    return int(np.copysign(np.floor(np.abs(value) + np.float32(0.5)), value))


def _of_float(function: Callable[[np.ndarray], np.ndarray], x: QuantParams, y: QuantParams) -> np.ndarray:
    """A table that the kernel fills by evaluating a float function."""
    real = _centred(x).astype(np.float32) * np.float32(x.scale)
    steps = function(real.astype(np.float64)).astype(np.float32) * (np.float32(1) / np.float32(y.scale))
    rounded = np.copysign(np.floor(np.abs(steps) + np.float32(0.5)), steps)
    return _int8(rounded.astype(np.int64) + y.zero_point, y)


def _leaky(x: QuantParams, y: QuantParams, slope: float) -> np.ndarray:
    centred = _centred(x)
    positive = _rescaled(centred, _ratio64(x, y), y)
    alpha = float(np.float32(slope))
    scaled = float(np.float32(x.scale)) * alpha / float(np.float32(y.scale))
    negative = (
        _rescaled(centred, abs(scaled), y)
        if scaled >= 0
        else 2 * y.zero_point - _rescaled(centred, abs(scaled), y)
    )
    return _int8(np.where(centred >= 0, positive, negative), y)


def _hard_swish(x: QuantParams, y: QuantParams) -> np.ndarray | None:
    """``v * min(max(v + 3, 0), 6) / 6`` in 16 bits: seven further bits, two multipliers of 15 bits.

    None where the output's scale is so small that the kernel refuses it.
    """
    fine = np.float32(1 / 128) * np.float32(x.scale)
    value = _centred(x) * 128
    out, out_exponent = _multiplier15(float(fine / np.float32(y.scale)))
    gate, gate_exponent = _multiplier15(float(fine / (np.float32(3) / np.float32(32768))))
    if out_exponent > 0:
        return None
    scaled = _high(value, out, rounding=True)
    opened = value
    if gate_exponent > 0:
        opened = _saturated(opened << (gate_exponent - 1))
    opened = _high(opened, gate, rounding=True)
    if gate_exponent > 0:
        opened = _saturated(opened << 1)
    if gate_exponent < 0:
        opened = _shifted(opened, -gate_exponent)
    opened = (opened + SIXTEEN) >> 1
    product = _high(opened, scaled, rounding=False)
    return _int8(_shifted(product, -out_exponent) + y.zero_point, y)


def _multiplier15(real: float) -> tuple[int, int]:
    """Return a multiplier of 15 bits and the power of two it goes with, from one of 31 bits."""
    wide = fixed_point(real, GEMMLOWP_BITS)
    multiplier, exponent = int(wide.multiplier), GEMMLOWP_BITS - int(wide.shift)
    if multiplier >= 2**31 - 2**15:
        return SIXTEEN - 1, exponent
    return (multiplier + SIXTEEN) >> 16, exponent


def _high(a: Integers, b: Integers | int, *, rounding: bool) -> Integers:
    """The high half of twice a product of 16-bit integers; without rounding it is cut towards zero."""
    product = a * b
    if rounding:
        product = product + np.where(product >= 0, 2**14, 1 - 2**14)
    magnitude = np.abs(product) >> 15
    return _saturated(np.where(product < 0, -magnitude, magnitude))


def _shifted(values: Integers, places: int) -> Integers:
    """A shift to the right that rounds half away from zero."""
    mask = (1 << places) - 1
    threshold = (mask >> 1) + (values < 0)
    shifted: Integers = (values >> places) + ((values & mask) > threshold)
    return shifted


def _saturated(values: Integers) -> Integers:
    return np.clip(values, -SIXTEEN, SIXTEEN - 1)
