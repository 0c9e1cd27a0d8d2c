"""Measured times in a profile: looking them up, and the model fitted to them for shapes nobody measured."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from bitwright.compiler.plan.signature import beside
from bitwright.targets.schema import MeasuredTimes, WorkFit

Source = Literal["measured", "fitted", "modelled"]
_OTHER = {"q": "f", "f": "q"}
MIN_POINTS = 4
NEAR = 1.25
_DIGITS = re.compile("[0-9]+")


@dataclass(frozen=True)
class Estimate:
    """Seconds, and where the number comes from.

    Attributes:
        seconds: Of one call.
        source: ``"measured"``: this very call, on the target; ``"fitted"``: from measurements of other shapes;
            ``"modelled"``: from the profile's cost model.
    """

    seconds: float
    source: Source

    def __add__(self, other: Estimate) -> Estimate:
        """Return the sum; it is as good as its worse part."""
        order: tuple[Source, ...] = ("measured", "fitted", "modelled")
        worse = max(self.source, other.source, key=order.index)
        return Estimate(self.seconds + other.seconds, worse)


@dataclass(frozen=True)
class Point:
    """One measured call.

    Attributes:
        macs: Multiply-accumulates.
        bytes: Bytes read and written at least once.
        seconds: Measured.
    """

    macs: float
    bytes: float
    seconds: float


def look_up(times: MeasuredTimes, op: str, fmt: str, key: str, neighbour: str = "") -> float | None:
    """Return the measured seconds of exactly this call, else of the one that only writes another type; else None.

    Args:
        times: The measurements.
        op: Operator type.
        fmt: Its format.
        key: Its signature.
        neighbour: Format of the layer before it; the mean over all neighbours counts where this one was not measured.
    """
    known: dict[str, float] = times.times.get(op, {}).get(fmt, {})  # type: ignore[call-overload]
    other = _OTHER.get(key[-1:])
    keys = [key, key[:-1] + other] if other else [key]
    found = (known.get(k) for name in keys for k in (beside(name, neighbour), name))
    return next((seconds for seconds in found if seconds is not None), None)


def nearest(times: MeasuredTimes, op: str, fmt: str, key: str) -> float | None:
    """Return the seconds of the measured call of the same form whose sizes are nearest, scaled to this one's; or None.

    Rewrites that make a model easier to quantize add a few channels to a layer; what was fused into it then still is,
    which no fitted model knows. No size may differ by more than a quarter.
    """
    form, sizes = _parsed(key)
    best: tuple[float, float] | None = None
    known: dict[str, float] = times.times.get(op, {}).get(fmt, {})  # type: ignore[call-overload]
    for other, seconds in known.items():
        other_form, others = _parsed(other)
        if form != other_form:
            continue
        apart = [
            abs(math.log(max(a, 1) / max(b, 1))) for a, b in zip(_flat(sizes), _flat(others), strict=True)
        ]
        if max(apart, default=0.0) <= math.log(NEAR) and (best is None or sum(apart) < best[0]):
            best = sum(apart), seconds * _elements(sizes) / max(_elements(others), 1)
    return None if best is None else best[1]


Sizes = tuple[tuple[int, ...], ...]


@cache
def _parsed(key: str) -> tuple[tuple[object, ...], Sizes]:
    """Split a signature into its form (constants, ranks, what is fused, what is written) and its sizes."""
    shapes, _, writes = key.partition(" ")
    inputs, _, rest = shapes.partition(">")
    outputs, *tail = rest.split("+")
    operands = [*inputs.split(","), *outputs.split(",")]
    sizes = tuple(tuple(int(d) for d in _DIGITS.findall(text)) for text in operands)
    constant = tuple(text.startswith("c") for text in operands)
    return (constant, tuple(map(len, sizes)), tuple(tail), writes), sizes


def _flat(sizes: Sizes) -> list[int]:
    return [d for shape in sizes for d in shape]


def _elements(sizes: Sizes) -> int:
    return sum(math.prod(shape) for shape in sizes)


def fitted(times: MeasuredTimes, names: Sequence[str], fmt: str, macs: float, moved: float) -> float | None:
    """Return the seconds of the first fitted kind of work, or None if none was fitted for the format."""
    for name in names:
        fit: WorkFit | None = times.fits.get(name, {}).get(fmt)  # type: ignore[call-overload]
        if fit is not None:
            return fit.call_s + fit.mac_s * macs + fit.byte_s * moved
    return None


def fit_work(points: Sequence[Point]) -> WorkFit | None:
    """Fit ``a + b * macs + c * bytes`` to measurements; None where there are too few.

    The sum of squared *relative* residuals is least, with non-negative coefficients: a call of a microsecond counts
    as much as one of a millisecond. Columns are scaled to their largest entry first, since MACs and seconds differ by
    ten orders of magnitude.
    """
    from scipy.optimize import nnls

    seconds = np.array([p.seconds for p in points], np.float64)
    usable = seconds > 0
    if int(usable.sum()) < MIN_POINTS:
        return None
    table = np.array([[1.0, p.macs, p.bytes] for p in points], np.float64)[usable] / seconds[usable, None]
    scale = np.maximum(table.max(axis=0), np.finfo(np.float64).tiny)
    solution, _ = nnls(table / scale, np.ones(len(table)))
    found = solution / scale
    error = float(np.median(np.abs(table @ found - 1.0)))
    return WorkFit(
        call_s=float(found[0]),
        mac_s=float(found[1]),
        byte_s=float(found[2]),
        points=len(table),
        error=error,
    )
