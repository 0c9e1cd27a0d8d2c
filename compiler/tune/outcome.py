"""What tuning came to: for every workload of a model, which kernel it gets and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitwright.compiler.program.workload import Workload
from bitwright.compiler.tune.records import Key, Record
from bitwright.compiler.tune.store import Contents, Known
from bitwright.targets.backend import KernelChoice

# A choice must beat the default by this much: where its code happens to lie in a library moves it by as much.
WORTH = 0.03

Source = Literal["default", "record", "tuned"]


@dataclass(frozen=True)
class TunedKernel:
    """The kernel of one workload.

    Attributes:
        workload: The work, and the steps that do it.
        record: The measurement it rests on; None: nothing is known, the default is taken.
        source: ``"tuned"`` now, from a ``"record"``, or the ``"default"``.
    """

    workload: Workload
    record: Record | None
    source: Source

    @property
    def choice(self) -> KernelChoice | None:
        """The kernel, None for the template's default."""
        return None if self.source == "default" or self.record is None else self.record.choice

    @property
    def ratio(self) -> float | None:
        """Its time over the default's, None where nothing was measured."""
        return None if self.record is None else self.record.ratio

    @property
    def default_s(self) -> float:
        """What the default kernel takes in all calls; 0 where nobody knows."""
        return 0.0 if self.record is None else self.record.default_s * self.workload.calls

    def as_plain(self) -> dict[str, Any]:
        """Return the row of a report."""
        record = self.record
        known = record is not None and math.isfinite(record.seconds)
        return {
            "workload": self.workload.label,
            "steps": list(self.workload.steps),
            "source": self.source,
            "kernel": None if record is None else record.choice.label(),
            "default_s": record.default_s if record is not None and known else None,
            "seconds": record.seconds if record is not None and known else None,
            "ratio": record.ratio if record is not None and known else None,
            "trials": 0 if record is None else record.trials,
            "record": None if record is None else record.name(),
        }


@dataclass(frozen=True)
class Tuning:
    """What tuning came to.

    Attributes:
        kernels: One for each workload, in order of first use.
        hardware: What the times hold for; empty if nothing here can time such kernels.
        store: File of the records.
        executed: How kernels were timed now: ``"native"``, ``"modelled"``, ``"remote"``; empty if none was.
        trials: Kernels measured now.
        seconds: Wall time of that.
        interrupted: The user ended it.
        notes: What the user should know.
    """

    kernels: tuple[TunedKernel, ...]
    hardware: str
    store: Path
    executed: str = ""
    trials: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    notes: tuple[str, ...] = ()

    @property
    def choices(self) -> dict[str, KernelChoice]:
        """Workload key -> kernel, where it is not the default."""
        return {k.workload.key: k.choice for k in self.kernels if k.choice is not None}

    @property
    def ratio(self) -> float | None:
        """Time of all measured kernels over that of the defaults, each as often as the model calls it."""
        known = [k for k in self.kernels if k.record is not None]
        default_s = sum(k.default_s for k in known)
        return sum(k.default_s * (k.ratio or 1.0) for k in known) / default_s if default_s else None

    def as_plain(self) -> dict[str, Any]:
        """Return the section of a report."""
        return {
            "hardware": self.hardware,
            "store": str(self.store),
            "executed": self.executed,
            "trials": self.trials,
            "seconds": self.seconds,
            "interrupted": self.interrupted,
            "ratio": self.ratio,
            "notes": list(self.notes),
            "kernels": [k.as_plain() for k in self.kernels],
        }


def best_record(known: Known) -> Record | None:
    """Return the measurement that decides: of a search that ended, else the fastest trial of one that did not."""
    if known.finished is not None:
        return known.finished
    good = [record for record in known.trials.values() if record.status == "ok"]
    return min(good, key=lambda record: record.ratio, default=None)


def from_records(workloads: Sequence[Workload], hardware: str, contents: Contents) -> tuple[TunedKernel, ...]:
    """Return the kernels that a store knows for the workloads."""
    return tuple(_from_record(w, best_record(contents.of(Key(w.key, hardware)))) for w in workloads)


def _from_record(workload: Workload, record: Record | None) -> TunedKernel:
    # A search that ended has looked twice; a single trial may have been lucky.
    needed = 1 - WORTH if record is not None and record.kind == "trial" else 1.0
    if record is None or record.ratio >= needed:
        return TunedKernel(workload, record, "default")
    return TunedKernel(workload, record, "record")
