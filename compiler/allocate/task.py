"""The unit of work of a sensitivity measurement: one candidate on all samples, in this or any other process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitwright.compiler.allocate.losses import LossKind, LossMeter
from bitwright.compiler.errors import DataError, ModelError
from bitwright.compiler.ingest.evaluator import load_eval
from bitwright.compiler.ort.session import SessionConfig, callable_model, open_session, run


@dataclass(frozen=True)
class Task:
    """Run one model and compare.

    Attributes:
        folder: Where all files are.
        model: File of the model to run.
        tensors: Input name -> .npz file with one array for each sample, named ``0``, ``1``, ...
        references: Output name -> .npz file of the float model's values.
        samples: How many.
        loss: What to compute.
        evaluate: For ``eval``: ``FILE.py:FUNC``.
        float_value: For ``eval``: the metric of the float model.
        config: Session options.
        shared: Further files that the model refers to.
    """

    folder: str
    model: str
    tensors: Mapping[str, str]
    references: Mapping[str, str]
    samples: int
    loss: LossKind
    evaluate: str | None
    float_value: float
    config: SessionConfig
    shared: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files that it reads."""
        names = (self.model, *self.shared, *self.tensors.values(), *self.references.values())
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class Outcome:
    """A loss, and why it is infinite if it is."""

    loss: float
    reason: str = ""


def run_task(task: Task) -> Outcome:
    """Measure one candidate; one that ONNX Runtime cannot run, or whose outputs are not finite, loses everything."""
    try:
        return _evaluated(task) if task.loss == "eval" else _compared(task)
    except (DataError, ModelError) as error:
        return Outcome(math.inf, error.what)


def _evaluated(task: Task) -> Outcome:
    assert task.evaluate is not None
    metric = load_eval(task.evaluate)
    value = metric(callable_model(open_session(Path(task.folder, task.model), task.config)))
    drop = task.float_value - value
    return Outcome(drop / abs(task.float_value) if task.float_value else drop)


def _compared(task: Task) -> Outcome:
    session = open_session(Path(task.folder, task.model), task.config)
    meter = LossMeter(task.loss)
    for feeds, exact in zip(_samples(task, task.tensors), _samples(task, task.references), strict=True):
        actual = run(session, feeds)
        for name, reference in exact.items():
            meter.add(name, reference, actual[name])
        if meter.fault:
            return Outcome(math.inf, meter.fault)
    value = meter.value()
    return Outcome(value, "" if math.isfinite(value) else "the float model's output is zero")


def _samples(task: Task, files: Mapping[str, str]) -> Iterator[dict[str, np.ndarray]]:
    folder = Path(task.folder)
    archives = {name: np.load(folder / file, allow_pickle=False) for name, file in files.items()}
    try:
        for k in range(task.samples):
            yield {name: archive[str(k)] for name, archive in archives.items()}
    finally:
        for archive in archives.values():
            archive.close()
