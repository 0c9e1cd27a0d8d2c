"""Whether the machine had other work while something was measured."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil

# An idle machine takes the processor away a few times a second, a shared one hundreds of times.
PREEMPTED_PER_S = 50.0
SPARE_LOAD = 0.5
WIDE = 0.05


@dataclass(frozen=True)
class Surroundings:
    """What else the machine did.

    Attributes:
        load: Average number of runnable threads over the last minute.
        cores: Logical processors.
        preempted: Times per second of measuring that the system took the processor away.
    """

    load: float
    cores: int
    preempted: float

    def busy(self, threads: int) -> bool:
        """Whether others competed with ``threads`` threads of ours."""
        return self.load > threads + SPARE_LOAD or self.preempted > PREEMPTED_PER_S

    def warnings(self, threads: int, half_width: float) -> tuple[str, ...]:
        """Return what a reader of the figures must know.

        Args:
            threads: Threads of ours that computed.
            half_width: Of the interval, relative to the ratio.
        """
        if not self.busy(threads):
            return ()
        state = (
            f"load {self.load:.1f} on {self.cores} processors, preempted {self.preempted:.0f} times a second"
        )
        if half_width > WIDE:
            return (f"the machine is busy ({state}) and the interval is wide: measure again when it is idle",)
        if threads > 1:
            return (f"the machine is busy ({state}): wall times of several threads mean little",)
        return ()


def surroundings(preempted: float) -> Surroundings:
    """Return the state of the machine now.

    Args:
        preempted: As measured by the contestants.
    """
    return Surroundings(psutil.getloadavg()[0], os.cpu_count() or 1, preempted)
