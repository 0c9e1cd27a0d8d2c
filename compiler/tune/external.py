"""Timing candidates elsewhere: in a model of the processor, or on several boards at once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.tune.kernels import Batch, Bench, Candidate
from bitwright.compiler.tune.timing import Announce, Timing
from bitwright.targets.backend import KernelTimer


@dataclass(frozen=True)
class _Library:
    """A linked batch and what its default kernel computes."""

    path: Path
    bench: Bench
    default: Candidate

    def run(self, timer: KernelTimer, candidate: Candidate) -> tuple[float, np.ndarray]:
        return timer.run(self.path, candidate.symbol, self.bench.arguments(candidate.kernel))


class ExternalMeasurer:
    """Runs every candidate beside the default kernel on the same timer, so that boards may differ a little.

    Args:
        timers: One for each board; all of one kind.
    """

    def __init__(self, timers: Sequence[KernelTimer]) -> None:
        self._timers = tuple(timers)

    @property
    def hardware(self) -> str:
        """Name of what the times are taken on."""
        return self._timers[0].hardware

    @property
    def executed(self) -> str:
        """``"modelled"`` or ``"remote"``."""
        return self._timers[0].executed

    def measure(self, bench: Bench, batch: Batch, *, rounds: int, announce: Announce) -> Sequence[Timing]:
        """Return the timings of a batch whose first candidate is the default kernel.

        ``rounds`` is not used: a timer takes the best of as many calls as its clock needs.

        Raises:
            ToolchainError: Not even the default kernel could be executed.
        """
        default, *others = batch.candidates
        free: SimpleQueue[KernelTimer] = SimpleQueue()
        for timer in self._timers:
            free.put(timer)

        def one(candidate: Candidate) -> Timing:
            timer = free.get()
            try:
                return _compared(timer, library, candidate)
            finally:
                free.put(timer)

        with tempfile.TemporaryDirectory(prefix="bitwright-tune-") as work:
            library = _Library(bench.library(batch, Path(work)), bench, default)
            announce(default.choice)
            seconds, _ = library.run(self._timers[0], default)
            with ThreadPoolExecutor(len(self._timers)) as pool:
                found = list(pool.map(one, others))
        return [Timing(default.choice, "ok", seconds, seconds), *found]


def _compared(timer: KernelTimer, library: _Library, candidate: Candidate) -> Timing:
    """Return a candidate's timing against the default on the same timer, its result checked."""
    try:
        default_s, expected = library.run(timer, library.default)
        seconds, result = library.run(timer, candidate)
    except ToolchainError as error:
        return Timing(candidate.choice, "crashed", detail=error.what)
    if np.asarray(result).tobytes() != np.asarray(expected).tobytes():
        return Timing(candidate.choice, "wrong", detail="its output differs from the default's")
    return Timing(candidate.choice, "ok", seconds, default_s)
