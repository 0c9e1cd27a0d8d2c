"""The calibration methods: from the statistics of a tensor to the range its quantizer covers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bitwright.compiler.calibrate.clipping import least_divergence, least_square_error
from bitwright.compiler.calibrate.histogram import GrowingHistogram
from bitwright.compiler.calibrate.statistics import TensorStatistics
from bitwright.compiler.errors import UsageError, nearest


@dataclass(frozen=True)
class MinMax:
    """The exact smallest and largest value."""

    def __str__(self) -> str:
        return "minmax"


@dataclass(frozen=True)
class MovingAverage:
    """The running average of every sample's smallest and largest value.

    Attributes:
        constant: Weight of a new sample once ``1 / constant`` samples were seen; before that the plain mean
            is kept, so that the first sample does not dominate.
    """

    constant: float = 0.01

    def __str__(self) -> str:
        return f"moving_average:{self.constant:g}"


@dataclass(frozen=True)
class Percentile:
    """The interval that holds ``percent`` per cent of the values; half of the rest is cut at either end."""

    percent: float = 99.99

    def __str__(self) -> str:
        return f"percentile:{self.percent:.10g}"


@dataclass(frozen=True)
class Mse:
    """The clipping range of least expected squared quantization error."""

    def __str__(self) -> str:
        return "mse"


@dataclass(frozen=True)
class Entropy:
    """The clipping range of least Kullback-Leibler divergence."""

    def __str__(self) -> str:
        return "entropy"


Method = MinMax | MovingAverage | Percentile | Mse | Entropy

METHODS: dict[str, type[Method]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "mse": Mse,
    "entropy": Entropy,
}


def needs_histogram(method: Method) -> bool:
    """Tell whether the method needs more than the smallest and largest values."""
    return isinstance(method, Percentile | Mse | Entropy)


def parse_method(text: str) -> Method:
    """Read a method and its parameter, e.g. ``mse`` or ``percentile:99.9``.

    Raises:
        UsageError: Unknown method, or a parameter that is missing, unwanted or out of range.
    """
    name, colon, parameter = text.strip().partition(":")
    if name not in METHODS:
        msg = f"unknown calibration method '{name}'"
        raise UsageError(msg, where=text, fix=nearest(name, [*METHODS, "judged"]))
    if not colon:
        return METHODS[name]()
    if not fields(METHODS[name]):
        msg = f"calibration method '{name}' takes no parameter"
        raise UsageError(msg, where=text, fix=f"write '{name}'")
    return _with_parameter(name, parameter, text)


def _with_parameter(name: str, parameter: str, text: str) -> Method:
    try:
        value = float(parameter)
    except ValueError:
        value = math.nan
    if name == "percentile" and 50.0 < value <= 100.0:
        return Percentile(value)
    if name == "moving_average" and 0.0 < value <= 1.0:
        return MovingAverage(value)
    allowed = "above 50, up to 100" if name == "percentile" else "above 0, up to 1"
    msg = f"the parameter of '{name}' must be a number {allowed}"
    raise UsageError(msg, where=text, fix=f"write '{METHODS[name]()}'")


def range_from(
    statistics: TensorStatistics, method: Method, *, levels: int, symmetric: bool
) -> tuple[float, float]:
    """Return the range that the quantizer of a tensor should cover.

    Args:
        statistics: What :func:`~bitwright.compiler.calibrate.stream.collect` saw, for a method that needs no
            more.
        method: How to choose.
        levels: Grid points of the quantizer, e.g. 256 for 8 bits, 255 for the narrow symmetric int8. The grid
            meant is ``step = (high - low) / (levels - 1)`` with zero point ``rint(-low / step)``.
        symmetric: Return ``(-t, t)``.

    Returns:
        ``(low, high)`` in real units with ``low <= 0 <= high``; ``(0, 0)`` if and only if every value was
        zero.
    """
    assert levels >= 2, "a grid has two points"
    if statistics.low == statistics.high == 0.0:
        return 0.0, 0.0
    low, high = _choose(statistics, method, levels, symmetric)
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        low, high = -max(high, -low), max(high, -low)
    if low == high:
        # So sparse that the method cut away everything but zero: a range of no width would lose the tensor.
        return range_from(statistics, MinMax(), levels=levels, symmetric=symmetric)
    return low + 0.0, high + 0.0  # never -0.0


def _choose(
    statistics: TensorStatistics, method: Method, levels: int, symmetric: bool
) -> tuple[float, float]:
    match method:
        case MinMax():
            return statistics.low, statistics.high
        case MovingAverage():
            return statistics.average_low, statistics.average_high
        case Percentile(percent):
            return _percentile(_histogram(statistics), percent, symmetric)
        case Mse():
            return least_square_error(_histogram(statistics), levels, symmetric)
        case Entropy():
            return least_divergence(_histogram(statistics), levels, symmetric)


def _percentile(histogram: GrowingHistogram, percent: float, symmetric: bool) -> tuple[float, float]:
    """Cut both tails alike, as ONNX Runtime's percentile calibrator does; of magnitudes there is one tail."""
    if symmetric:
        top = histogram.absolute().quantile(percent / 100)
        return -top, top
    tail = (1 - percent / 100) / 2
    return histogram.quantile(tail), histogram.quantile(1 - tail)


def _histogram(statistics: TensorStatistics) -> GrowingHistogram:
    assert statistics.histogram is not None, "collect() was told of the method"
    return statistics.histogram
