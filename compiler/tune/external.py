"""Timing candidates elsewhere: in a model of the processor, or on several boards at once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

import numpy as np

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.tune.kernels import Batch, Bench, Candidate
from bitwright.compiler.tune.timing import Announce, Timing
from bitwright.targets.backend import KernelTimer


@dataclass(frozen=True)
class _Library:
    """A linked batch.

    Attributes:
        path: The shared library.
        bench: Makes arguments.
        default: The default kernel.
        known: Its time and output, where they are the same every time.
    """

    path: Path
    bench: Bench
    default: Candidate
    known: tuple[float, np.ndarray] | None = None

    def run(self, timer: KernelTimer, candidate: Candidate) -> tuple[float, np.ndarray]:
        return timer.run(self.path, candidate.symbol, self.bench.arguments(candidate.kernel))


class ExternalMeasurer:
    """Runs every candidate beside the default kernel on the same timer, so that boards may differ a little.

    Args:
        timers: One for each board; all of one kind.
    """

    def __init__(self, timers: Sequence[KernelTimer]) -> None:
        self._timers = tuple(timers)
        self._lock = Lock()

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

        ``rounds`` is not used: a timer takes the best of as many calls as its clock needs. A board that cannot even
        execute the default kernel is left out from then on; its candidate goes to another one.

        Raises:
            ToolchainError: No board is left.
        """
        default, *others = batch.candidates
        with tempfile.TemporaryDirectory(prefix="bitwright-tune-") as work:
            library = _Library(bench.library(batch, Path(work)), bench, default)
            announce(default.choice)
            first = self._first_run(library)
            if self.executed == "modelled":  # it gives the same figure every time
                library = replace(library, known=first)
            free: SimpleQueue[KernelTimer | None] = SimpleQueue()
            for timer in self._timers:
                free.put(timer)
            with ThreadPoolExecutor(len(self._timers)) as pool:
                found = list(pool.map(lambda candidate: self._timed(library, candidate, free), others))
        return [Timing(default.choice, "ok", first[0], first[0]), *found]

    def _first_run(self, library: _Library) -> tuple[float, np.ndarray]:
        while True:
            timer = self._timers[0]
            try:
                return library.run(timer, library.default)
            except ToolchainError as error:
                self._lose(timer, error)

    def _timed(
        self, library: _Library, candidate: Candidate, free: SimpleQueue[KernelTimer | None]
    ) -> Timing:
        """Return a candidate's timing on the next board that is free and works."""
        while (timer := free.get()) is not None:
            try:
                default = library.known or library.run(timer, library.default)
            except ToolchainError as error:
                try:
                    self._lose(timer, error)
                except ToolchainError:
                    free.put(None)
                    raise
                continue
            found = _compared(timer, library, candidate, default)
            free.put(timer)
            return found
        free.put(None)  # for whoever else waits
        msg = "no board is left"
        raise ToolchainError(msg, where="tuning")

    def _lose(self, timer: KernelTimer, error: ToolchainError) -> None:
        """Leave a timer out; raises ``error`` if it was the last."""
        with self._lock:
            self._timers = tuple(t for t in self._timers if t is not timer) or self._timers
            if self._timers == (timer,):
                raise error


def _compared(
    timer: KernelTimer, library: _Library, candidate: Candidate, default: tuple[float, np.ndarray]
) -> Timing:
    """Return a candidate's timing beside the default's on the same timer, its result checked."""
    default_s, expected = default
    try:
        seconds, result = library.run(timer, candidate)
    except ToolchainError as error:
        return Timing(candidate.choice, "crashed", detail=error.what)
    if np.asarray(result).tobytes() != np.asarray(expected).tobytes():
        return Timing(candidate.choice, "wrong", detail="its output differs from the default's")
    return Timing(candidate.choice, "ok", seconds, default_s)
