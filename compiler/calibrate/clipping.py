"""Searches for the clipping range that loses least, on a histogram."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.calibrate.histogram import GrowingHistogram, Segments

# First look at 1, 2**-0.25, ... 2**-10 of the full range: fine enough to bracket the minimum, and small
# enough to cut an outlier a thousand times larger than the rest. Then look closer around the best.
COARSE = np.exp2(-np.arange(41) / 4)
FINE_STEPS = 16
ENTROPY_CANDIDATES = 128


def expected_square_error(mass: Segments, low: float, high: float, levels: int) -> float:
    """Return the sum of squared quantization errors, exact for mass spread evenly over each segment.

    With ``u = x / step`` and ``k`` the nearest grid point, clipped to the grid, the integral of ``(u -
    k)**2`` is ``k / 12 + (u - k)**3 / 3``: inside the grid every whole cell adds 1/12, outside it the cubic
    is the clipping error. Unlike evaluating bin centres this stays right when a bin is wider than a step
    (16-bit grids).

    Args:
        mass: Where the data lie; exact zeros are left out because they cost nothing.
        low: Lower end of the range, <= 0.
        high: Upper end, >= 0, above ``low``.
        levels: Grid points; ``step = (high - low) / (levels - 1)``, zero point ``rint(-low / step)``.

    Returns:
        Sum of squared errors in squared real units.
    """
    step = (high - low) / (levels - 1)
    zero_point = np.rint(-low / step)

    def parts(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        u = x / step
        k = np.minimum(np.maximum(np.rint(u), -zero_point), levels - 1 - zero_point)
        return u - k, k

    (left_rest, left_k), (right_rest, right_k) = parts(mass.left), parts(mass.right)
    length = (mass.right - mass.left) / step
    integral = (right_k - left_k) / 12 + (_cube(right_rest) - _cube(left_rest)) / 3
    # A segment of (almost) no length is a point: its integral divided by its length would be 0 / 0.
    point = length < 1e-6
    mean = np.where(point, right_rest**2, integral / np.where(point, 1.0, length))
    return float(np.dot(mass.counts, mean)) * step**2


def _cube(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * x * x  # x**3 calls pow for every element


def least_square_error(histogram: GrowingHistogram, levels: int, symmetric: bool) -> tuple[float, float]:
    """Return the range with the least expected squared error.

    The objective is that of Banner et al., "Post training 4-bit quantization of convolutional networks for
    rapid-deployment" (NeurIPS 2019), eq. 1, evaluated on the data's histogram instead of a fitted density.
    The full range is always a candidate, so the result is never worse than min/max in this measure. The upper
    end is searched first, then the lower, then the upper again.

    Args:
        histogram: Statistics with at least one value that is not zero.
        levels: Grid points.
        symmetric: Search one magnitude for both ends.
    """
    mass, below, above = histogram.segments(), max(-histogram.low, 0.0), max(histogram.high, 0.0)
    if symmetric:
        top = _search(max(below, above), lambda t: expected_square_error(mass, -t, t, levels))
        return -top, top
    share = _search(1.0, lambda s: expected_square_error(mass, -below * s, above * s, levels))
    bottom, top = below * share, above * share
    if below > 0.0 and above > 0.0:
        top = _search(above, lambda t: expected_square_error(mass, -bottom, t, levels), top)
        bottom = _search(below, lambda t: expected_square_error(mass, -t, top, levels), bottom)
        top = _search(above, lambda t: expected_square_error(mass, -bottom, t, levels), top)
    return -bottom, top


def _search(full: float, cost: Callable[[float], float], start: float | None = None) -> float:
    """Return the magnitude in (0, full] of least cost; ``start`` (the present choice) is a candidate too."""
    if full <= 0.0:
        return 0.0
    grid = full * COARSE
    costs = [cost(float(t)) for t in grid]
    best = int(np.argmin(costs))
    fine = np.linspace(grid[min(best + 1, len(grid) - 1)], grid[max(best - 1, 0)], FINE_STEPS + 1)
    candidates = [(costs[best], float(grid[best])), *((cost(float(t)), float(t)) for t in fine)]
    if start:
        candidates.append((cost(start), start))
    # Ties go to the wider range: it is the one that later data are less likely to leave.
    return min(candidates, key=lambda c: (c[0], -c[1]))[1]


def least_divergence(histogram: GrowingHistogram, levels: int, symmetric: bool) -> tuple[float, float]:
    """Return the range of least Kullback-Leibler divergence between the data and its quantized form.

    S. Migacz, "8-bit Inference with TensorRT" (GTC 2017), with four corrections: exact zeros are left out
    (they are represented exactly and would dominate); the histogram keeps both signs, and data of one sign
    get all the levels; clipped values are added to the outermost bin that holds data, so that no bin has mass
    in the data and none in its quantized form; and a candidate never has fewer bins than levels. A histogram
    with fewer bins than levels cannot show any loss, so the full range is returned.

    Args:
        histogram: Statistics with at least one value that is not zero.
        levels: Grid points.
        symmetric: Return ``(-t, t)``; else ``t`` limits both ends and neither exceeds the data.
    """
    full = max(histogram.high, -histogram.low)
    counts = histogram.counts.astype(np.float64)
    if histogram.zeros:
        counts[-histogram.first] -= histogram.zeros

    def ends(limit: float) -> tuple[float, float]:
        if symmetric:
            return -limit, limit
        return max(min(histogram.low, 0.0), -limit), min(max(histogram.high, 0.0), limit)

    last = int(np.ceil(full / histogram.width))
    limits = np.unique(np.linspace(1, last, min(ENTROPY_CANDIDATES, last)).round()) * histogram.width
    best, best_ends = np.inf, ends(full)
    for limit in limits[::-1]:
        low, high = ends(min(float(limit), full))
        if (high - low) / histogram.width < levels:
            break
        divergence = _divergence(histogram, counts, low, high, levels)
        if divergence < best:
            best, best_ends = divergence, (low, high)
    return best_ends


def _divergence(
    histogram: GrowingHistogram, counts: NDArray[np.float64], low: float, high: float, levels: int
) -> float:
    """Return KL(data clipped to the range || data quantized to ``levels`` in the range), in nats."""
    begin = max(int(np.floor(low / histogram.width)) - histogram.first, 0)
    end = min(int(np.ceil(high / histogram.width)) - histogram.first, histogram.bins)
    index = begin + np.flatnonzero(counts[begin:end])
    if index.size == 0:
        return np.inf
    inside = counts[index]
    centres = (index + histogram.first + 0.5) * histogram.width
    step = (high - low) / (levels - 1)
    level = np.clip(np.rint((centres - low) / step), 0, levels - 1).astype(np.intp)
    mass, occupied = np.bincount(level, inside), np.bincount(level)
    quantized = mass[level] / occupied[level]
    reference = inside.copy()
    reference[0] += counts[:begin].sum()
    reference[-1] += counts[end:].sum()
    p, q = reference / reference.sum(), quantized / quantized.sum()
    return float(np.sum(p * np.log(p / q)))
