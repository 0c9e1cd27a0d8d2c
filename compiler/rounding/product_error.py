"""What quantizing both operands of a linear layer costs, predicted from sampled rows that did not set the ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
# From rows [n, K] that may be looked at to (channel that each new channel copies, None for all once; divisors [K']).
Rewrite = Callable[[Float32], tuple[NDArray[np.intp] | None, Float32]]

# Shares of the observed range that the activation quantizer may cover.
COVERED = (1.0, 0.85, 0.7)
# Output columns that an error is measured on: it is a mean over columns, more only cost time.
COLUMNS = 192


@dataclass(frozen=True)
class AffineQuantizer:
    """``q(x) = (clip(rint(x / step) + zero, 0, levels - 1) - zero) * step``, one for a whole tensor."""

    step: float
    zero: float
    levels: int

    def __call__(self, rows: Float32) -> Float32:
        """Return the values that the integers stand for."""
        steps = self._steps(rows * np.float32(1 / self.step))
        steps *= np.float32(self.step)
        return steps

    def noise(self, rows: Float32) -> NDArray[np.float64]:
        """Return the sum over the rows of ``(q(x) - x)^2``, float64 [K]."""
        exact = rows * np.float32(1 / self.step)
        noise = self._steps(exact)
        noise -= exact
        power: NDArray[np.float64] = np.einsum("nk,nk->k", noise, noise).astype(np.float64) * self.step**2
        return power

    def _steps(self, exact: Float32) -> Float32:
        steps: Float32 = np.rint(exact)
        np.clip(steps, np.float32(-self.zero), np.float32(self.levels - 1 - self.zero), out=steps)
        return steps


def fit_quantizer(rows: Float32, importance: NDArray[np.float64], levels: int) -> AffineQuantizer:
    """Return the quantizer of least ``sum_j importance_j (q(x_j) - x_j)^2`` over a few shares of the range.

    Args:
        rows: float32 [n, K].
        importance: float64 [K], e.g. the squared norms of the weight's rows.
        levels: Grid points, e.g. 256 for 8 bits.
    """
    low, high = min(float(rows.min(initial=0.0)), 0.0), max(float(rows.max(initial=0.0)), 0.0)
    if low == high:
        return AffineQuantizer(1.0, 0.0, levels)
    best, least = AffineQuantizer(1.0, 0.0, levels), np.inf
    for share in COVERED:
        step = (high - low) * share / (levels - 1)
        candidate = AffineQuantizer(step, float(np.rint(-low * share / step)), levels)
        error = float(candidate.noise(rows) @ importance)
        if error < least:
            best, least = candidate, error
    return best


def nearest_columns(weight: Float32, largest: int) -> Float32:
    """Return ``weight`` [K, N] rounded to a symmetric integer grid, one scale a column: ``max|w| / largest``."""
    step = np.abs(weight).max(axis=0, initial=0.0) / np.float32(largest)
    step = np.where(step == 0, np.float32(1.0), step).astype(np.float32)
    return np.asarray(np.rint(weight / step) * step, np.float32)


@dataclass(frozen=True)
class ProductError:
    """``||Q(X') Q(W') - X W||^2 / ||X W||^2`` of a rewritten product ``X' W' = X W``, cross-validated.

    Ranges and statistics come from one half of the rows and the error from the other, both ways round: what is
    seldom seen in calibration data (a channel's rare large value) costs here what it would cost in use, and a
    rewrite that fits the ranges too tightly to what was seen is found out.

    Attributes:
        rows: float32 [n, K], n >= 4.
        weight: float32 [K, N], of all layers that read the rows, side by side.
        levels: Grid points of the activation.
        largest: Largest integer of the weights.
    """

    rows: Float32
    weight: Float32
    levels: int = 256
    largest: int = 127

    def of(self, rewrite: Rewrite) -> float:
        """Return the error of a rewrite.

        Args:
            rewrite: From rows [n, K] to which channel each new channel is a copy of (None: all, once) and
                what it is divided by, float32 [K']: ``X'_j = X_index(j) / divisor_j``. The weight's rows are
                those of the copied channel, times the divisor where the channel is not split (None).
        """
        noise, signal = self._totals(rewrite)
        return noise / max(signal, 1e-30)

    def noise(self, rewrite: Rewrite) -> float:
        """Return ``||Q(X') Q(W') - X W||^2`` of a rewrite, cross-validated."""
        return self._totals(rewrite)[0]

    def _totals(self, rewrite: Rewrite) -> tuple[float, float]:
        half = len(self.rows) // 2
        first, second = self.rows[:half], self.rows[half:]
        parts = [self._half(a, b, *rewrite(a)) for a, b in ((first, second), (second, first))]
        return sum(noise for noise, _ in parts), sum(signal for _, signal in parts)

    def _half(
        self, seen: Float32, unseen: Float32, index: NDArray[np.intp] | None, divisor: Float32
    ) -> tuple[float, float]:
        stride = -(-self.weight.shape[1] // COLUMNS)
        columns = self.weight[:, ::stride]
        scaled = self.weight * divisor[:, None] if index is None else self.weight[index]
        power = np.einsum("kn,kn->k", scaled, scaled).astype(np.float64)
        take: NDArray[np.intp] | slice = slice(None) if index is None else index
        quantizer = fit_quantizer(seen[:, take] / divisor, power, self.levels)
        exact = unseen @ columns
        noise = quantizer(unseen[:, take] / divisor) @ nearest_columns(scaled[:, ::stride], self.largest)
        noise -= exact
        return float(np.vdot(noise, noise)), float(np.vdot(exact, exact))
