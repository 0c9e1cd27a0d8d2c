"""The training loop: seeded, deterministic, resumable, with the best state by held-out samples as its result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.training.alignment import Alignment
from bitwright.compiler.training.checkpoint import Checkpoint
from bitwright.compiler.training.distillation import Distillation
from bitwright.compiler.training.graph_module import GraphModule
from bitwright.compiler.training.samples import TrainingData

WARM_UP = 0.05  # share of the steps in which the rates rise
GRADIENT_NORM = 1.0
TIMED_STEPS = 4
JUDGEMENTS = 12  # of a run
SLOWEST = 0.01  # of the rate, at the end of the schedule
# Share of the steps in which layers are aligned. The biases that alignment comes to are not yet rounded to the steps of
# their accumulators, which are coarse where bits are few (2-bit weights and 4-bit activations: the divergence doubled);
# in the rest, at falling rates, all that is written is trained.
ALIGNED = 0.5
SCALE_PARTS = ("log_scale", "log_gain", "shift")
FOLDED_SAMPLES = 512  # those that say what alignment comes to, outside training

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        epochs: Times that every sample is seen.
        minutes: Bound on the time; steps are as many as fit by the time that the first ones take. None: no bound.
        rate: Largest step of weights (Adam).
        scale_rate: The same of the logarithms of scales.
        save_every: Steps between checkpoints.
    """

    epochs: float
    minutes: float | None
    rate: float
    scale_rate: float
    save_every: int


@dataclass(frozen=True)
class Outcome:
    """What training did; the student holds the best state.

    Attributes:
        steps: Done in all.
        first_loss: Held-out loss before the first step.
        best_loss, best_step: Of the state that is kept.
        history: (step, held-out loss).
    """

    steps: int
    first_loss: float
    best_loss: float
    best_step: int
    history: tuple[tuple[int, float], ...]


class Loop:
    """One run.

    Args:
        student: The rounded model; trained in place.
        teacher: The float model.
        data: Samples.
        loss: Of a batch.
        schedule: How long and how fast.
        settings: Written to checkpoints, which fit only a run of the same.
        place: Checkpoint file, None for no checkpoints.
        progress: Told about every step.
        alignment: Of the student's layers with the teacher's, None for none.
    """

    def __init__(
        self,
        student: GraphModule,
        teacher: GraphModule,
        data: TrainingData,
        loss: Distillation,
        schedule: Schedule,
        settings: dict[str, Any],
        place: Path | None,
        progress: Progress,
        alignment: Alignment | None = None,
    ) -> None:
        self.student, self.teacher, self.data, self.loss = student, teacher, data, loss
        self.schedule, self.settings, self.place, self.progress = schedule, settings, place, progress
        self.alignment = alignment
        self.named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
        if alignment is not None:
            self.named += [(f"alignment.{n}", p) for n, p in alignment.named_parameters()]
            student.watch, teacher.watch = alignment.align, alignment.observe
        scales = [p for n, p in self.named if n.endswith(SCALE_PARTS)]
        weights = [p for n, p in self.named if not n.endswith(SCALE_PARTS)]
        parts = [(weights, schedule.rate), (scales, schedule.scale_rate)]
        groups = [{"params": parameters, "lr": rate} for parameters, rate in parts if parameters]
        self.rates = [rate for parameters, rate in parts if parameters]
        self.optimizer = torch.optim.Adam(groups)
        self.state = Checkpoint(settings, 0, 0, 0, math.inf)
        self.best: dict[str, Tensor] = {}

    def run(self, resume: Checkpoint | None = None) -> Outcome:
        """Train to the end of the schedule; leave the best state in the student.

        Args:
            resume: Go on from here.

        Raises:
            DataError: The loss is not finite.
        """
        if resume is not None:
            self._restore(resume)
        else:
            self._judge()
            self.state.total = self._steps()
        every = max(1, self.state.total // JUDGEMENTS)
        while self.state.step < self.state.total:
            self._align()
            self._step(self.state.step)
            self.state.step += 1
            last = self.state.step == self.state.total
            if self.state.step % every == 0 or last:
                self._judge()
            if self.place is not None and (last or self.state.step % self.schedule.save_every == 0):
                self._save(self.place)
            self.progress(self.state.step, self.state.total, f"steps, loss {self.state.best_loss:.4g}")
        self._load(self.best)
        history = tuple(self.state.history)
        return Outcome(self.state.step, history[0][1], self.state.best_loss, self.state.best_step, history)

    def _steps(self) -> int:
        """Return how many steps the schedule has; with a bound on time by the time of a few, which leave no trace."""
        wanted = max(1, math.ceil(self.schedule.epochs * self.data.steps_per_epoch))
        if self.schedule.minutes is None:
            return wanted
        before = self._snapshot()
        start = 0.0
        for k in range(TIMED_STEPS + 1):
            if k == 1:
                start = time.perf_counter()  # the first is slower than all others
            self._gradients(k)
        each = (time.perf_counter() - start) / TIMED_STEPS
        self._load(before)
        self.optimizer.zero_grad(set_to_none=True)
        return max(1, min(wanted, int(60.0 * self.schedule.minutes / each)))

    def _gradients(self, step: int) -> None:
        batch = self.data.at(step)
        with torch.no_grad():
            wanted = self.teacher(batch.feeds)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.student(batch.feeds), wanted, batch.labels)
        if not bool(torch.isfinite(loss)):
            what = f"the loss of step {step} is not finite"
            raise DataError(what, where="train", fix="pass a smaller --rate; look for outliers in the data")
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in self.named], GRADIENT_NORM)

    def _step(self, step: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * pace(step, self.state.total)
        self._gradients(step)
        self.optimizer.step()

    def _judge(self) -> None:
        """Measure the held-out loss of the state as it would be written; keep it if it is the best."""
        if self.alignment is None or not self.alignment.active:
            self._measure()
            return
        self._fold(self.alignment)
        with self.alignment.inactive():
            self._measure()

    def _fold(self, alignment: Alignment) -> None:
        # To stay: what aligned layers compute does not depend on it, and the next fold has less to do.
        alignment.fold(self.student, self.teacher, (b.feeds for b in self.data.some(FOLDED_SAMPLES)))

    def _align(self) -> None:
        """Align layers in the first part of the schedule alone."""
        if self.alignment is None:
            return
        end = round(ALIGNED * self.state.total)
        if self.state.step == end:
            self._fold(self.alignment)
        self.alignment.active = self.state.step < end

    def _measure(self) -> None:
        losses, rows = 0.0, 0
        with torch.no_grad():
            for batch in self.data.held_out():
                count = len(next(iter(batch.feeds.values())))
                found = self.loss.judged(self.student(batch.feeds), self.teacher(batch.feeds), batch.labels)
                losses, rows = losses + float(found) * count, rows + count
        loss = losses / max(1, rows)
        self.state.history.append((self.state.step, loss))
        if loss < self.state.best_loss or not self.best:
            self.state.best_loss, self.state.best_step = loss, self.state.step
            self.best = self._snapshot()

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named}

    def _load(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(state[name])

    def _save(self, place: Path) -> None:
        arrays = {f"best/{n}": t.numpy() for n, t in self.best.items()}
        for name, parameter in self.named:
            arrays[f"value/{name}"] = parameter.detach().numpy()
            for part, tensor in self.optimizer.state.get(parameter, {}).items():
                arrays[f"{part}/{name}"] = np.asarray(tensor.detach().numpy())
        self.state.arrays = arrays
        self.state.write(place)

    def _restore(self, found: Checkpoint) -> None:
        arrays = {name: torch.from_numpy(np.array(array)) for name, array in found.arrays.items()}
        needed = {f"{kind}/{name}": p.shape for name, p in self.named for kind in ("value", "best")}
        if any(k not in arrays or arrays[k].shape != shape for k, shape in needed.items()):
            what = "the checkpoint belongs to another model"
            raise UsageError(what, where="--resume", fix="leave --resume out")
        self._load({name: arrays[f"value/{name}"] for name, _ in self.named})
        self.best = {name: arrays[f"best/{name}"] for name, _ in self.named}
        for name, parameter in self.named:
            parts = {
                p: arrays[f"{p}/{name}"] for p in ("step", "exp_avg", "exp_avg_sq") if f"{p}/{name}" in arrays
            }
            if parts:
                self.optimizer.state[parameter] = parts
        self.state = found


def pace(step: int, total: int) -> float:
    """Return the share of the largest rate at a step: a short rise, then a half cosine down to a hundredth."""
    rise = max(1, round(WARM_UP * total))
    if step < rise:
        return (step + 1) / rise
    share = (step - rise) / max(1, total - rise)
    return SLOWEST + (1 - SLOWEST) * 0.5 * (1 + math.cos(math.pi * share))
