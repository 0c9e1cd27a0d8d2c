"""Paired timing: two models take turns in one process, and the figure is the median of the pairwise ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from bitwright.compiler.ort.session import run

# Seconds aimed at for a round, so that the clock's step does not matter.
ROUND_S = 0.03
# The same where the figure is reported and decides nothing; tests make it shorter.
REPORTED_ROUND_S = ROUND_S


@dataclass(frozen=True)
class PairedTiming:
    """Two models measured alternately.

    Attributes:
        ratio: Median over the rounds of (first / second).
        spread: Interquartile range of that ratio.
        first_s: Best seconds of one round of the first model.
        second_s: Best seconds of one round of the second model.
        rounds: How many pairs were measured.
        what: What was computed, if not the samples.
    """

    ratio: float
    spread: float
    first_s: float
    second_s: float
    rounds: int
    what: str = ""


def _round(session: ort.InferenceSession, feeds: Sequence[Mapping[str, np.ndarray]], calls: int) -> float:
    """CPU seconds of this thread for ``calls`` sweeps: other jobs on the machine do not count, one thread computes."""
    start = time.thread_time()
    for _ in range(calls):
        for sample in feeds:
            run(session, sample)
    return time.thread_time() - start


def best_wall_seconds(
    session: ort.InferenceSession, feeds: Mapping[str, np.ndarray], *, calls: int = 15
) -> float:
    """Return the shortest wall time of one call, after a warm-up."""
    best = float("inf")
    for _ in range(calls + 1):
        start = time.perf_counter()
        run(session, feeds)
        best = min(best, time.perf_counter() - start)
    return best


def _calls(session: ort.InferenceSession, feeds: Sequence[Mapping[str, np.ndarray]], round_s: float) -> int:
    once = max(min(_round(session, feeds, 1) for _ in range(3)), 1e-6)
    return max(1, min(2000, int(round_s / once)))


def time_paired(
    first: ort.InferenceSession,
    second: ort.InferenceSession,
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    rounds: int = 15,
    round_s: float = ROUND_S,
) -> PairedTiming:
    """Time two single-thread sessions on the same inputs, alternately.

    Args:
        first: The candidate.
        second: The reference.
        feeds: Inputs of one sweep.
        rounds: Pairs of rounds.
        round_s: Aim for this many seconds a round.
    """
    return _summary(_pairs(first, second, feeds, rounds, round_s))


def time_reopened(
    first: Callable[[], ort.InferenceSession],
    second: Callable[[], ort.InferenceSession],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    first_feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
    sessions: int = 3,
    rounds: int = 7,
    round_s: float | None = None,
) -> PairedTiming:
    """As :func:`time_paired`, over several pairs of fresh sessions.

    Where a session's buffers happen to lie changes the time of a small model by ten per cent, for the session's whole
    life; only opening it again averages that out.

    Args:
        first: Opens the candidate.
        second: Opens the reference.
        feeds: Inputs of one sweep.
        first_feeds: The same for the candidate, where its inputs are of other types.
        sessions: How often to open both.
        rounds: Pairs of rounds for each.
        round_s: Seconds aimed at for a round; by default those of figures that decide nothing.
    """
    round_s = REPORTED_ROUND_S if round_s is None else round_s
    return _summary(
        np.concatenate(
            [_pairs(first(), second(), feeds, rounds, round_s, first_feeds) for _ in range(sessions)]
        )
    )


def _pairs(
    first: ort.InferenceSession,
    second: ort.InferenceSession,
    feeds: Sequence[Mapping[str, np.ndarray]],
    rounds: int,
    round_s: float,
    first_feeds: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> np.ndarray:
    """Return seconds of one call as an array [rounds, 2]; which model goes first alternates."""
    calls = _calls(second, feeds, round_s)
    given = (feeds if first_feeds is None else first_feeds, feeds)
    _round(first, given[0], 1)
    times = np.empty((rounds, 2))
    for k in range(rounds):
        order = ((0, first), (1, second)) if k % 2 == 0 else ((1, second), (0, first))
        for column, session in order:
            times[k, column] = _round(session, given[column], calls)
    return times / calls / len(feeds)


def _summary(times: np.ndarray) -> PairedTiming:
    ratios = times[:, 0] / np.maximum(times[:, 1], 1e-9)
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    best = times.min(axis=0)
    return PairedTiming(float(middle), float(high - low), float(best[0]), float(best[1]), len(times))
