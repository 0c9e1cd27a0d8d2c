"""The rounds of a measurement: every placement once a round, so that all see the machine at its best and its worst."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from bitwright.compiler.compilation import Progress
from bitwright.compiler.errors import BitwrightError
from bitwright.compiler.ort.profiling import CallProfile
from bitwright.compiler.plan.observations import Observation
from bitwright.compiler.probing.observe import Observed, Placed, measure, observe
from bitwright.targets.schema import Profile

ROUNDS = 3
LEAST_S = 0.02


@dataclass
class Measurement:
    """Everything measured so far.

    Attributes:
        observations: Of operators and conversions.
        calls: Seconds of a call that belong to none, of every placement.
        seconds: Placement -> seconds of the whole call.
        notes: What could not be measured, and why.
    """

    observations: list[Observation] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def call_s(self) -> float:
        """Median seconds of a call that belong to no operator."""
        return float(np.median(self.calls)) if self.calls else 0.0

    def add(self, label: str, found: Observed) -> None:
        """Take in one placement."""
        self.observations.extend(found.observations)
        self.calls.append(found.call_s)
        self.seconds[label] = found.seconds


def measure_all(
    placements: Sequence[Placed],
    profile: Profile,
    *,
    threads: int,
    seconds: float,
    progress: Progress,
    measurement: Measurement,
) -> None:
    """Measure placements in turns and add what was found.

    Args:
        placements: What to run.
        profile: The target; this machine must be it.
        threads: Threads that compute.
        seconds: About how long to measure, all rounds together.
        progress: Told about every run.
        measurement: Takes the results; a placement that ONNX Runtime refuses becomes a note.
    """
    each = max(seconds / ROUNDS / max(len(placements), 1), LEAST_S)
    found: dict[int, list[CallProfile]] = {}
    refused: set[int] = set()
    total = ROUNDS * len(placements)
    start = time.perf_counter()
    for run in range(total):
        k = run % len(placements)
        late = run >= len(placements) and time.perf_counter() - start > 2 * seconds
        if k in refused or late:
            continue
        progress.step(run, total, placements[k].label)
        try:
            found.setdefault(k, []).append(measure(placements[k], profile, threads=threads, seconds=each))
        except BitwrightError as error:
            refused.add(k)
            measurement.notes.append(f"{placements[k].label}: not measured: {error.what}")
    for k, calls in found.items():
        if k not in refused:
            measurement.add(placements[k].label, observe(placements[k], calls, profile))
