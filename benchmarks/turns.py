"""Contestants that take turns in one process; what counts is the best thread CPU time of one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

Call = Callable[[], object]


def best_times(calls: Sequence[Call], rounds: int, round_s: float = 0.004) -> list[float]:
    """Return the best seconds of each call, measured in turns.

    Args:
        calls: The contestants.
        rounds: Turns of each; one more, of a single call, comes before them.
        round_s: Calls are repeated so often that a turn takes about so long.
    """
    best = [float("inf")] * len(calls)
    for number in range(rounds + 1):
        for k, call in enumerate(calls):
            repeats = 1 if number == 0 else max(1, int(round_s / best[k]))
            start = time.thread_time()
            for _ in range(repeats):
                call()
            best[k] = min(best[k], (time.thread_time() - start) / repeats)
    return best
