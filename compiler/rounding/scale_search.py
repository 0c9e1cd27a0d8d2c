"""Scales and zero points of least square error, per tensor, per channel or per group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import InternalError
from bitwright.compiler.rounding.grid import Grid, Quantizer
from bitwright.compiler.rounding.objective import check_weights

# Shares of the max-abs scale that are tried. Few levels may want to give up much of the range, 256 next to none; a
# codebook's levels are no even steps, so only trying tells where the weights meet them best.
RATIOS = np.linspace(1.0, 0.3, 36)
# With more levels than this no smaller share was ever the best.
FEW_LEVELS, LOWEST_OF_MANY = 32, 0.7
# Rounds of least squares between levels and scales behind the search.
ROUNDS = 2
SHIFTS = (-2, -1, 1, 2)
# Weights that are looked at together: the temporaries of one step fit the second-level cache.
BLOCK = 1 << 16
SMALLEST_SCALE = np.float32(2.0**-100)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """How many weights share a scale.

    Attributes:
        group: Rows of a column that share a scale; 0 for whole columns.
        per_tensor: One scale for everything.
        zero_points: Each scale has a zero point, so the range need not lie evenly around zero.
    """

    group: int = 0
    per_tensor: bool = False
    zero_points: bool = False


class _Blocks:
    """Weights cut into the parts that share a scale: (P, g, N), P = G * B, with one importance a row."""

    def __init__(self, weights: Float32, importance: Float64, grid: Grid, layout: Layout) -> None:
        self.groups, self.depth, self.columns = weights.shape
        self.size = min(layout.group, self.depth) or self.depth
        self.count = -(-self.depth // self.size)
        self.grid, self.layout = grid, layout
        padding = [(0, 0), (0, self.count * self.size - self.depth)]
        self.weights = np.pad(weights, [*padding, (0, 0)]).reshape(-1, self.size, self.columns)
        known = importance.mean() if importance.mean() > 0 else 1.0
        self.importance = np.pad(importance / known, padding).reshape(-1, 1, self.size).astype(np.float32)

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Yield slices of (P, N) whose weights fit a block."""
        blocks = max(1, BLOCK // (self.size * self.columns))
        columns = self.columns if blocks > 1 else max(1, BLOCK // self.size)
        for p in range(0, len(self.weights), blocks):
            for n in range(0, self.columns, columns):
                yield slice(p, p + blocks), slice(n, n + columns)

    def total(self, parts: NDArray[np.floating]) -> NDArray[np.floating]:
        """Add what shares a scale: everything if there is one only."""
        return parts.sum(keepdims=True) if self.layout.per_tensor else parts

    def range(self) -> tuple[Float32, Float32]:
        """Return the ends of the weights' ranges, widened to contain zero, shape (P, N) or (1, 1)."""
        low, high = self.weights.min(axis=1), self.weights.max(axis=1)
        if self.layout.per_tensor:
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        return np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))

    def _levels(self, p: slice, n: slice, scale: Float32, zero: Float32) -> tuple[Float32, Float32, Float64]:
        """Return (levels - zero point), the weights in steps, and the scales of one part."""
        s, z = (a if a.size == 1 else a[p, n] for a in (scale, zero))
        s, z = s[:, None], z[:, None]
        steps = self.weights[p, :, n] / s
        levels = self.grid.nearest(steps + z)
        levels -= z
        return levels.astype(np.float32, copy=False), steps, s[:, 0].astype(np.float64)

    def errors(self, scale: Float32, zero: Float32) -> Float64:
        """Return the weighted square error of each scale."""
        found = np.empty((len(self.weights), self.columns))
        for p, n in self.parts():
            levels, steps, s = self._levels(p, n, scale, zero)
            # In steps, where nothing overflows, whatever the size of the weights.
            levels -= steps
            levels *= levels
            found[p, n] = (self.importance[p] @ levels)[:, 0] * s**2
        return self.total(found).astype(np.float64)

    def least_squares(self, scale: Float32, zero: Float32) -> Float32:
        """Return the scales that fit the present levels best: ``sum d w l / sum d l^2``."""
        above = np.empty((len(self.weights), self.columns))
        below = np.empty_like(above)
        for p, n in self.parts():
            levels, steps, s = self._levels(p, n, scale, zero)
            above[p, n] = (self.importance[p] @ (levels * steps))[:, 0] * s
            below[p, n] = (self.importance[p] @ (levels * levels))[:, 0]
        products, squares = self.total(above), self.total(below)
        fits = (products > 0) & (squares > 0)
        return np.where(fits, products / np.where(fits, squares, 1.0), scale).astype(np.float32)


def search_scales(
    weights: Float32, importance: Float64, grid: Grid, layout: Layout | None = None
) -> Quantizer:
    """Return the quantizer of least ``sum_k importance_k (w_k - Q(w_k))^2``.

    Shares of the max-abs scale are tried one after the other (the "MSE" option of GPTQ's reference code), and the
    best is improved by least squares between levels and scales, which can only lower the error. With the mean
    square of each input as importance the sum is the output error that would result if inputs were uncorrelated
    (the diagonal of Nagel et al. 2020, "Up or Down?", section 3.2).

    Args:
        weights: float32, shape (G, K, N).
        importance: Not negative, float64, shape (G, K).
        grid: The levels.
        layout: What shares a scale; per column by default.

    Returns:
        Scales (and zero points if wanted) for these weights, at least 2^-100; blocks of zeros get scale 1.

    Raises:
        ModelError: A weight is not finite.
    """
    layout = layout or Layout()
    check_weights(weights)
    if layout.zero_points and not grid.uniform:
        msg = f"a zero point moves integers; '{grid.name}' has none"
        raise InternalError(msg)
    blocks = _Blocks(weights, importance, grid, layout)
    return _Search(blocks).run()


class _Search:
    """The best scales so far."""

    def __init__(self, blocks: _Blocks) -> None:
        self._blocks = blocks
        low, high = blocks.range()
        grid = blocks.grid
        if blocks.layout.zero_points:
            self._scale = _usable((high - low) / np.float32(grid.high - grid.low))
            self._zero = np.clip(np.rint(grid.low - low / self._scale), grid.low, grid.high)
        else:
            self._scale = _usable(np.maximum(high, -low) / np.float32(grid.reach))
            self._zero = np.zeros_like(self._scale)
        self._error = blocks.errors(self._scale, self._zero)

    def run(self) -> Quantizer:
        start = self._scale
        lowest = 0.0 if len(self._blocks.grid.values) <= FEW_LEVELS else LOWEST_OF_MANY
        for ratio in RATIOS[(RATIOS < 1) & (lowest <= RATIOS)]:
            self._try(start * np.float32(ratio), self._zero)
        for _ in range(ROUNDS):
            self._try(self._blocks.least_squares(self._scale, self._zero), self._zero)
        if self._blocks.layout.zero_points:
            self._shift()
        return self._quantizer()

    def _shift(self) -> None:
        grid = self._blocks.grid
        for _ in range(ROUNDS):
            for shift in SHIFTS:
                zero = np.clip(self._zero + np.float32(shift), grid.low, grid.high)
                self._try(self._blocks.least_squares(self._scale, zero), zero)

    def _try(self, scale: Float32, zero: Float32) -> None:
        """Keep scales where they are better."""
        scale = np.maximum(scale, SMALLEST_SCALE).astype(np.float32)
        error = self._blocks.errors(scale, zero)
        better = error < self._error
        self._scale = np.where(better, scale, self._scale)
        self._zero = np.where(better, zero, self._zero)
        self._error = np.where(better, error, self._error)

    def _quantizer(self) -> Quantizer:
        blocks = self._blocks
        shape = (1, 1, 1) if blocks.layout.per_tensor else (blocks.groups, blocks.count, blocks.columns)
        zero = self._zero.astype(np.float32).reshape(shape) if blocks.layout.zero_points else None
        group = blocks.layout.group if blocks.count > 1 else 0
        return Quantizer(blocks.grid, self._scale.reshape(shape), zero, group)


def _usable(scale: NDArray[np.floating]) -> Float32:
    found = np.where(scale > 0, np.maximum(scale, SMALLEST_SCALE), np.float32(1))
    return found.astype(np.float32)


def weighted_error(weights: Float32, importance: Float64, quantizer: Quantizer) -> float:
    """Return ``sum_k importance_k (w_k - Q(w_k))^2`` over all weights, rounded to nearest."""
    residual = (weights - quantizer.dequantize(quantizer.nearest(weights))).astype(np.float64)
    return float(np.einsum("gkn,gkn,gk->", residual, residual, importance, optimize=True))


def choose_layout(
    weights: Float32, importance: Float64, grid: Grid, layouts: Sequence[Layout], *, margin: float = 0.1
) -> tuple[Layout, Quantizer]:
    """Search scales in several layouts and return the first whose error is next to the least.

    Args:
        weights: float32, shape (G, K, N).
        importance: As for :func:`search_scales`.
        grid: The levels.
        layouts: Candidates, the cheapest first.
        margin: A layout is good enough if its error is at most ``1 + margin`` times the least one.

    Raises:
        ModelError: A weight is not finite.
    """
    found = [search_scales(weights, importance, grid, layout) for layout in layouts]
    errors = [weighted_error(weights, importance, quantizer) for quantizer in found]
    limit = min(errors) * (1 + margin)
    chosen = next(k for k, error in enumerate(errors) if error <= limit)
    return layouts[chosen], found[chosen]
