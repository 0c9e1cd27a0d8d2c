"""The interval of a ratio of times: it covers the truth as often as it says, and it is the same every time."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.compiler.bench.statistics import Interval, geometric_mean, ratio_of_medians

TRUTH = 0.8


def drawn(seed: int, *, sessions: int, rounds: int, luck: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return times whose medians are TRUTH apart: drift that hits both in a round, and each process's own luck."""
    random = np.random.default_rng(seed)
    drift = random.lognormal(0, 0.3, (sessions, rounds))
    own = random.lognormal(0, luck, (2, sessions, 1)) * random.lognormal(0, 0.05, (2, sessions, rounds))
    return TRUTH * drift * own[0], drift * own[1]


def coverage(sessions: int, rounds: int, luck: float) -> float:
    found = [
        ratio_of_medians(*drawn(seed, sessions=sessions, rounds=rounds, luck=luck), resamples=300)
        for seed in range(200)
    ]
    return float(np.mean([i.low <= TRUTH <= i.high for i in found]))


def test_the_interval_covers_the_truth():
    # 95 % are promised; 200 draws of a true 0.95 stay above 0.90 with probability 0.998. A percentile bootstrap of a
    # median is conservative here, because what it is drawn from is discrete.
    assert coverage(sessions=1, rounds=30, luck=0.0) >= 0.90


def test_the_luck_of_processes_widens_the_interval():
    # Eight processes estimate a spread of 5 % with a bootstrap that is known to be too narrow for few clusters: a
    # normal-theory factor of t(7)/z = 1.21 is missing, which leaves 90 %, and 200 draws stay above 0.83 of that.
    assert coverage(sessions=8, rounds=10, luck=0.05) >= 0.83
    lucky, steady = (
        ratio_of_medians(*drawn(1, sessions=8, rounds=10, luck=luck)).half_width for luck in (0.2, 0.0)
    )
    assert lucky > 1.5 * steady


def test_drift_that_hits_both_cancels():
    random = np.random.default_rng(0)
    drift = random.lognormal(0, 1.0, (2, 10))
    found = ratio_of_medians(TRUTH * drift, drift)
    assert found.low == pytest.approx(TRUTH) and found.high == pytest.approx(TRUTH)


def test_the_same_seed_gives_the_same_interval():
    first, second = drawn(0, sessions=3, rounds=10)
    found = ratio_of_medians(first, second, seed=7)
    assert found == ratio_of_medians(first, second, seed=7)
    assert found != ratio_of_medians(first, second, seed=8)
    assert found.value == pytest.approx(np.median(first) / np.median(second))


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(0.9, 0.99, True), (0.9, 1.1, False), (1.01, 1.2, True), (0.9, 1.0, False)]
)
def test_a_difference_is_shown_only_if_one_is_outside(low: float, high: float, shown: bool):
    assert Interval(1.0, low, high).shows_difference is shown


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one():
    assert geometric_mean([0.25, 4.0]) == pytest.approx(1.0)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
