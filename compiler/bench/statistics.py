"""Ratios of times with an interval: resampling over processes first, then over the rounds inside each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

RESAMPLES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Interval:
    """A ratio and where it may lie.

    Attributes:
        value: The ratio itself.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def shows_difference(self) -> bool:
        """The interval excludes 1."""
        return self.low > 1.0 or self.high < 1.0

    @property
    def half_width(self) -> float:
        """Half of the interval's width, relative to the value."""
        return (self.high - self.low) / 2 / self.value


def ratio_of_medians(
    first: np.ndarray, second: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> Interval:
    """Return median(first) / median(second) with a bootstrap percentile interval.

    A process keeps its luck (where its buffers lie) for life, and a round its neighbours: so whole processes are
    drawn first, then rounds inside the drawn ones, and both contenders keep their round together.

    Args:
        first: Seconds [processes, rounds], all positive.
        second: Seconds of the same shape, measured in the same rounds.
        seed: Of the resampling; the same seed gives the same interval.
        resamples: Bootstrap samples.
        level: Share of the samples inside the interval.
    """
    assert first.shape == second.shape and first.ndim == 2 and first.size
    random = np.random.default_rng(seed)
    processes, rounds = first.shape
    rows = random.integers(processes, size=(resamples, processes, 1))
    columns = random.integers(rounds, size=(resamples, processes, rounds))
    ratios = _medians(first[rows, columns]) / _medians(second[rows, columns])
    tail = 50 * (1 - level)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Interval(float(np.median(first) / np.median(second)), float(low), float(high))


def _medians(samples: np.ndarray) -> np.ndarray:
    return np.asarray(np.median(samples.reshape(len(samples), -1), axis=1))


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean of at least one positive number."""
    return float(np.exp(np.mean(np.log(list(ratios)))))
