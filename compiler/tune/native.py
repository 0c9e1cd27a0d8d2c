"""Timing candidates on this machine: taking turns in one process, by the thread's own clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm

from bitwright.compiler.tune.kernels import Batch, Bench, Candidate
from bitwright.compiler.tune.timing import Announce, Timing

# A turn is long enough for the clock and short enough that the machine's mood is the same for all.
TURN_S = 4e-4
# Kernels of milliseconds need fewer turns: their noise is a smaller share.
KERNEL_S = 0.15
FEWEST_ROUNDS = 4
# After the first turns, nobody who is so much slower than the best becomes the best.
HOPELESS = 1.3


@dataclass
class _Contender:
    candidate: Candidate
    call: Callable[[], object]
    repeats: int = 1
    best_s: float = math.inf

    def turn(self) -> None:
        start = time.thread_time_ns()
        for _ in range(self.repeats):
            self.call()
        self.best_s = min(self.best_s, (time.thread_time_ns() - start) * 1e-9 / self.repeats)


@dataclass
class NativeMeasurer:
    """Executes candidates in this process, which a wrong one may end.

    Attributes:
        hardware: The processor's name.
        executed: ``"native"``.
    """

    hardware: str
    executed: str = field(default="native", init=False)

    def measure(self, bench: Bench, batch: Batch, *, rounds: int, announce: Announce) -> Sequence[Timing]:
        """Return the timings of a batch whose first candidate is the default kernel."""
        contenders: list[_Contender] = []
        wrong: list[Timing] = []
        expected: bytes | None = None
        for candidate in batch.candidates:
            announce(candidate.choice)
            contender, result = _first_run(bench, batch, candidate)
            expected = result if expected is None else expected
            if result == expected:
                contenders.append(contender)
            else:
                wrong.append(
                    Timing(candidate.choice, "wrong", detail="its output differs from the default's")
                )
        _take_turns(contenders, rounds)
        default_s = contenders[0].best_s
        good = [Timing(c.candidate.choice, "ok", c.best_s, default_s) for c in contenders]
        return [*good, *wrong]


def _first_run(bench: Bench, batch: Batch, candidate: Candidate) -> tuple[_Contender, bytes]:
    arrays = [tvm.runtime.tensor(array) for array in bench.arguments(candidate.kernel)]
    function = batch.executable[candidate.symbol]
    function(*arrays)
    return _Contender(candidate, lambda: function(*arrays)), np.asarray(arrays[-1].numpy()).tobytes()


def _take_turns(contenders: Sequence[_Contender], rounds: int) -> None:
    for contender in contenders:
        contender.turn()  # warm, and long enough to know how often a turn must repeat it
        contender.repeats = max(1, math.ceil(TURN_S / contender.best_s))
        contender.best_s = math.inf
    default, *others = contenders
    running = others
    for number in range(rounds):
        for contender in (default, *running):
            contender.turn()
        best = min(c.best_s for c in contenders)
        if number + 1 >= FEWEST_ROUNDS:
            running = [c for c in running if c.best_s < HOPELESS * best]
            if (number + 1) * best > KERNEL_S:
                return
