"""What a measurement of candidates is, whoever takes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bitwright.compiler.tune.records import Status
from bitwright.targets.backend import KernelChoice

if TYPE_CHECKING:  # it imports tvm, which the parent never does
    from bitwright.compiler.tune.kernels import Batch, Bench


@dataclass(frozen=True)
class Timing:
    """What became of one candidate.

    Attributes:
        choice: The candidate.
        status: As in a record.
        seconds: Best time of one call; infinite unless ``"ok"``.
        default_s: Best time of the default kernel, which took turns with it.
        detail: What went wrong.
    """

    choice: KernelChoice
    status: Status
    seconds: float = math.inf
    default_s: float = math.inf
    detail: str = ""


Announce = Callable[[KernelChoice], None]


class Measurer(Protocol):
    """Times compiled candidates: in this process, in a model of the processor, or on boards."""

    @property
    def hardware(self) -> str:
        """Name of what the times are taken on, a part of the records' keys."""
        ...

    @property
    def executed(self) -> str:
        """``"native"``, ``"modelled"`` or ``"remote"``."""
        ...

    def measure(self, bench: Bench, batch: Batch, *, rounds: int, announce: Announce) -> Sequence[Timing]:
        """Return the timings of a batch whose first candidate is the default kernel.

        Args:
            bench: Makes arguments, and a library where one is needed.
            batch: Compiled candidates.
            rounds: Turns that each of them gets at most.
            announce: Called before a candidate is executed for the first time: if the process dies, it did it.
        """
        ...
