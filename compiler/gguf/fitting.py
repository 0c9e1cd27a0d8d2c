"""Scales (and minima) of least weighted square error for groups of weights, before they are rounded themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.gguf.blocks import NONLINEAR, Format

Float32 = NDArray[np.float32]

# Where the largest magnitude of a group may land, as a share of the outermost level: beyond 1 it is cut off.
FEW_LEVELS_SHARES = np.linspace(0.8, 1.4, 13)
MANY_LEVELS_SHARES = np.linspace(0.9, 1.08, 10)
# The range of a group with a minimum, in steps more or less than it has levels.
RANGE_STEPS = np.linspace(-0.9, 0.9, 19)
WIDE_RANGE_STEPS = np.linspace(-1.2, 3.0, 22)
FEW_LEVELS = 8
LLOYD_ROUNDS = 2
TINY = np.float32(1e-30)


class Grid(Protocol):
    """The levels of a format."""

    @property
    def edges(self) -> tuple[int, ...]:
        """The outermost levels that are not zero."""
        ...

    def nearest(self, steps: Float32) -> Float32:
        """Return the nearest level of each value."""
        ...


class UniformGrid:
    """Integers."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = np.float32(low), np.float32(high)
        self.edges: tuple[int, ...] = (low, high) if low else (high,)

    def nearest(self, steps: Float32) -> Float32:
        """Return the nearest level of each value."""
        return np.clip(np.rint(steps), self._low, self._high)


class NonlinearGrid:
    """The levels of IQ4_NL, found in a table of half steps: the boundaries between them are multiples of a half."""

    edges: tuple[int, ...] = (int(NONLINEAR[0]), int(NONLINEAR[-1]))

    def __init__(self) -> None:
        middles = (NONLINEAR[1:] + NONLINEAR[:-1]) / 2
        halves = np.arange(-256, 257) / 2
        self._index = np.searchsorted(middles, halves, side="right").astype(np.int32)
        self._values = NONLINEAR.astype(np.float32)[self._index]

    def _places(self, steps: Float32) -> NDArray[np.int32]:
        found: NDArray[np.int32] = (np.clip(np.floor(2 * steps), -256, 256) + 256).astype(np.int32)
        return found

    def nearest(self, steps: Float32) -> Float32:
        """Return the nearest level of each value."""
        return self._values[self._places(steps)]

    def indices(self, levels: Float32) -> NDArray[np.int32]:
        """Return the numbers of levels in their list."""
        return self._index[self._places(levels)]


def grid_of(fmt: Format) -> UniformGrid | NonlinearGrid:
    """Return the levels of a format."""
    return NonlinearGrid() if fmt.type.name == "IQ4_NL" else UniformGrid(fmt.low, fmt.high)


def inverse(scale: Float32) -> Float32:
    """Return 1 / scale, and 0 for 0 and what is too small to be inverted."""
    usable = np.abs(scale) > TINY
    return np.where(usable, np.float32(1) / np.where(usable, scale, np.float32(1)), np.float32(0))


def total(values: Float32) -> Float32:
    """Add over the last axis."""
    found: Float32 = np.einsum("...k->...", values)
    return found


def dot(a: Float32, b: Float32) -> Float32:
    """Multiply and add over the last axis."""
    found: Float32 = np.einsum("...k,...k->...", a, b)
    return found


@dataclass
class _Best:
    """The best fit of each group so far; a gain is what the square error falls by from that of all zeros."""

    gain: Float32
    scale: Float32
    offset: Float32

    def take(self, gain: Float32, scale: Float32, offset: Float32) -> None:
        better = gain > self.gain
        self.gain = np.where(better, gain, self.gain)
        self.scale = np.where(better, scale, self.scale)
        self.offset = np.where(better, offset, self.offset)


def fit_scale(x: Float32, w: Float32, grid: Grid, levels: int) -> Float32:
    """Return the scale d of least ``sum w (x - d l)^2`` for each group.

    Args:
        x: Weights, float32, shape (..., k).
        w: Their importance, not negative, same shape.
        grid: The levels.
        levels: How many there are.

    Returns:
        Scales of either sign, shape (...); 0 for groups of zeros.
    """
    peak = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    wx = w * x
    zero = np.zeros_like(peak)
    best = _Best(zero, zero, zero)
    shares = FEW_LEVELS_SHARES if levels <= 16 else MANY_LEVELS_SHARES

    def attempt(scale: Float32) -> None:
        level = grid.nearest(x * inverse(scale)[..., None])
        products, squares = dot(wx, level), dot(w * level, level)
        fitted = products * inverse(squares)
        best.take(products * fitted, fitted, zero)

    for edge in grid.edges:
        for share in shares:
            attempt(peak / np.float32(edge * share))
    for _ in range(LLOYD_ROUNDS):
        attempt(best.scale)
    return best.scale


def fit_affine(x: Float32, w: Float32, high: int, *, below_zero: bool) -> tuple[Float32, Float32]:
    """Return d and m of least ``sum w (x - d q + m)^2``, q from 0 to ``high``, for each group.

    Args:
        x: Weights, float32, shape (..., k).
        w: Their importance, not negative, same shape.
        high: The largest code.
        below_zero: The minimum may not be above zero, so m is not negative.

    Returns:
        Two arrays of shape (...).
    """
    low, top = x.min(axis=-1), x.max(axis=-1)
    if below_zero:
        low = np.minimum(low, np.float32(0))
    wx = w * x
    sum_w, sum_x = total(w), total(wx)
    floor = np.zeros_like(low)
    best = _Best(np.full_like(low, -np.inf), (top - low) / np.float32(high), -low)

    def attempt(scale: Float32, offset: Float32) -> None:
        q = np.clip(np.rint((x + offset[..., None]) * inverse(scale)[..., None]), 0, np.float32(high))
        wq = w * q
        sum_q, sum_qq, sum_xq = total(wq), dot(wq, q), dot(wx, q)
        det = inverse(sum_w * sum_qq - sum_q * sum_q)
        d = (sum_w * sum_xq - sum_x * sum_q) * det
        m = (sum_q * sum_xq - sum_qq * sum_x) * det
        if below_zero:
            alone = (m < 0) | (det == 0)
            d = np.where(alone, sum_xq * inverse(sum_qq), d)
            m = np.where(alone, floor, m)
        # The fall of the error from that of zeros; exact for fitted d and m.
        best.take(2 * (d * sum_xq - m * sum_x) - (d * d * sum_qq - 2 * d * m * sum_q + m * m * sum_w), d, m)

    for step in WIDE_RANGE_STEPS if high < FEW_LEVELS else RANGE_STEPS:
        attempt((top - low) / np.float32(high + step), -low)
    for _ in range(LLOYD_ROUNDS):
        attempt(best.scale, best.offset)
    return best.scale, best.offset
