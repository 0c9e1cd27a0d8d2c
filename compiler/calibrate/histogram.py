"""A histogram of a stream: fixed number of bins, a range that grows, no sample kept and none lost."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import DataError

DEFAULT_BINS = 2048
# Bin widths stay in the range where multiplying a float32 by 1/width neither overflows nor loses the last
# bit.
SMALLEST_EXPONENT, LARGEST_FLOAT32_EXPONENT = -120, 120
# One chunk of work (float32 values and int64 bin numbers) fits the second-level cache of current CPUs.
CHUNK = 1 << 15


def finite_range(values: NDArray[np.floating], tensor: str) -> tuple[float, float]:
    """Return the smallest and largest value of a non-empty array.

    Args:
        values: Floats of any shape.
        tensor: Name of the tensor, for the message.

    Raises:
        DataError: The array is not of a floating-point type, or holds NaN or infinity.
    """
    if values.dtype.kind != "f":
        msg = f"only floating-point tensors can be calibrated, this one is {values.dtype}"
        raise DataError(
            msg,
            where=f"tensor '{tensor}'",
            fix="leave the tensor out of the calibrated set",
        )
    low, high = float(np.min(values)), float(np.max(values))  # both propagate NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        msg = "the calibration data make this tensor NaN or infinite"
        raise DataError(
            msg,
            where=f"tensor '{tensor}'",
            fix="check the samples for NaN or infinity and that the float model itself is finite on them",
        )
    return low, high


@dataclass(frozen=True)
class Segments:
    """Where the mass of a histogram lies, without exact zeros, which no quantizer gets wrong.

    Attributes:
        left, right: Ends of the non-empty bins, cut to the exact range of the data; float64, shape (n,).
        counts: Values in each; float64, shape (n,), all positive.
    """

    left: NDArray[np.float64]
    right: NDArray[np.float64]
    counts: NDArray[np.float64]


@dataclass
class GrowingHistogram:
    """Counts in ``bins`` equal bins over a range that always includes zero, and zero is always a bin edge.

    The bin width is the smallest power of two for which the data and zero fit into the bins. Bins are
    therefore only
    ever merged in pairs, which loses nothing but resolution, and the state depends on the data alone: not on
    their order, nor on how they were split over calls or over histograms that are merged later. One
    exception: a negative value closer to zero than 2**-126 bin widths is counted on the positive side.

    Attributes:
        bins: Number of bins; even.
        tensor: Name used in messages.
        counts: int64, shape (bins,); bin ``i`` counts ``[(first + i) * width, (first + i + 1) * width)``.
        exponent: Binary logarithm of the bin width.
        first: Position of the lowest bin, in bin widths; never positive.
        low, high: Exact smallest and largest value; ``inf`` and ``-inf`` before the first value.
        count: Values seen.
        zeros: How many of them were exactly zero (they are in ``counts`` too).
    """

    bins: int = DEFAULT_BINS
    tensor: str = ""
    counts: NDArray[np.int64] = field(init=False)
    exponent: int = SMALLEST_EXPONENT
    first: int = 0
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    zeros: int = 0

    def __post_init__(self) -> None:
        assert self.bins >= 2 and self.bins % 2 == 0, "pairs of bins are merged"
        self.counts = np.zeros(self.bins, np.int64)

    @property
    def width(self) -> float:
        """The bin width, a power of two."""
        return math.ldexp(1.0, self.exponent)

    def update(self, values: NDArray[np.floating], known_range: tuple[float, float] | None = None) -> None:
        """Count every element of ``values``.

        Args:
            values: Floats of any shape; may be empty.
            known_range: The array's exact range from :func:`finite_range`, when the caller has it already.

        Raises:
            DataError: The array is not floating point or not finite.
        """
        if values.size == 0:
            return
        low, high = known_range or finite_range(values, self.tensor)
        self._cover(low, high)
        flat = values.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            self._count(flat[start : start + CHUNK])
        self.count += flat.size

    def merge(self, other: GrowingHistogram) -> None:
        """Add the counts of another histogram, as if this one had seen its data too."""
        assert self.bins == other.bins, "only histograms of one size are merged"
        if other.count == 0:
            return
        self._cover(other.low, other.high)
        # Never negative: the other one saw a part of the data, and a part never needs wider bins than the
        # whole.
        self._add(other.counts, other.first, self.exponent - other.exponent)
        self.count += other.count
        self.zeros += other.zeros

    def segments(self) -> Segments:
        """Return the non-empty bins without the exact zeros."""
        counts = self.counts.copy()
        if self.zeros:
            counts[-self.first] -= self.zeros
        index = np.flatnonzero(counts)
        left = (index + self.first) * self.width
        return Segments(
            np.maximum(left, self.low),
            np.minimum(left + self.width, self.high),
            counts[index].astype(np.float64),
        )

    def quantile(self, share: float) -> float:
        """Return the value below which ``share`` of the data lies, to within one bin width.

        Args:
            share: Between 0 (the exact minimum) and 1 (the exact maximum).
        """
        assert self.count, "an empty histogram has no quantiles"
        mass = self.segments()
        at = int(np.searchsorted(mass.left, 0.0))
        left, right, counts = (
            np.insert(a, at, v) for a, v in ((mass.left, 0.0), (mass.right, 0.0), (mass.counts, self.zeros))
        )
        below = np.cumsum(counts)
        target = min(max(share, 0.0), 1.0) * self.count
        # Only a target of 0 can hit a segment without mass: the one of zeros, when it comes first and is
        # empty.
        i = int(np.searchsorted(below, target, side="left"))
        i += int(counts[i] == 0)
        inside = (target - (below[i] - counts[i])) / counts[i]
        return float(left[i] + inside * (right[i] - left[i]))

    def absolute(self) -> GrowingHistogram:
        """Return the histogram of the magnitudes, with the same bin width."""
        folded = GrowingHistogram(self.bins, self.tensor)
        folded.exponent, folded.count, folded.zeros = self.exponent, self.count, self.zeros
        position = np.arange(self.bins) + self.first
        np.add.at(folded.counts, np.where(position < 0, -position - 1, position) % self.bins, self.counts)
        folded.low = max(self.low, -self.high, 0.0)
        folded.high = max(self.high, -self.low)
        return folded

    def _cover(self, low: float, high: float) -> None:
        """Widen the exact range, and merge or move bins so that it and zero fit."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        bottom, top = min(self.low, 0.0), max(self.high, 0.0)
        exponent = max(self.exponent, _exponent_below(min(top - bottom, sys.float_info.max), self.bins))
        while math.floor(math.ldexp(top, -exponent)) - math.floor(math.ldexp(bottom, -exponent)) >= self.bins:
            exponent += 1
        first = math.floor(math.ldexp(bottom, -exponent))
        if (exponent, first) != (self.exponent, self.first):
            old, old_first, shift = self.counts, self.first, exponent - self.exponent
            self.counts, self.exponent, self.first = np.zeros(self.bins, np.int64), exponent, first
            self._add(old, old_first, shift)

    def _add(self, counts: NDArray[np.int64], first: int, shift: int) -> None:
        """Add bins that start at ``first`` and are ``2**shift`` times narrower than ours."""
        index = np.flatnonzero(counts)
        # Beyond 62 a shift is undefined in C; every position is then 0 or -1 all the same.
        np.add.at(self.counts, ((index + first) >> min(shift, 62)) - self.first, counts[index])

    def _count(self, chunk: NDArray[np.floating]) -> None:
        wide = chunk.dtype.itemsize > 4 or self.exponent > LARGEST_FLOAT32_EXPONENT
        dtype: type[np.floating] = np.float64 if wide else np.float32
        position = chunk.astype(dtype, copy=False) * dtype(math.ldexp(1.0, -self.exponent))
        np.floor(position, out=position)
        position -= dtype(self.first)
        self.counts += np.bincount(position.astype(np.intp), minlength=self.bins)
        if self.low <= 0.0 <= self.high:
            self.zeros += chunk.size - int(np.count_nonzero(chunk))


def _exponent_below(span: float, bins: int) -> int:
    """Return an exponent at or just below that of the smallest width whose ``bins`` bins cover ``span``."""
    return math.frexp(span / bins)[1] - 1 if span > 0 else SMALLEST_EXPONENT
