"""Measured times in a profile: looking them up, and the model fitted to them for shapes nobody measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bitwright.targets.schema import MeasuredTimes, WorkFit

Source = Literal["measured", "fitted", "modelled"]
_OTHER = {"q": "f", "f": "q"}
MIN_POINTS = 4


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


def look_up(times: MeasuredTimes, op: str, fmt: str, key: str) -> float | None:
    """Return the measured seconds of exactly this call, else of the one that only writes another type; else None."""
    known: dict[str, float] = times.times.get(op, {}).get(fmt, {})  # type: ignore[call-overload]
    if key in known:
        return known[key]
    other = _OTHER.get(key[-1:])
    return known.get(key[:-1] + other) if other else None


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
