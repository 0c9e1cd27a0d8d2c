"""Tuning a model: which workload gets the next measurements, what is remembered, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from bitwright.compiler.program.workload import Workload
from bitwright.compiler.tune.budget import TuneBudget
from bitwright.compiler.tune.outcome import WORTH, TunedKernel, Tuning, from_records
from bitwright.compiler.tune.records import Key, Record
from bitwright.compiler.tune.search import BATCH, GAIN, Search
from bitwright.compiler.tune.store import Contents, Known, TuningStore
from bitwright.compiler.tune.timing import Timing
from bitwright.targets.backend import KernelChoice

# A workload with a smaller share of the model's time is not worth a trial.
SHARE = 0.01
ROUNDS, CONFIRM_ROUNDS = 12, 30
# The fastest of many noisy timings is a lucky one: so many are timed again, with more turns, before one is chosen.
CONFIRMED = 3
OpenTimer = Callable[[], "AbstractContextManager[TimesKernels]"]
Report = Callable[[int, int, str], None]


class TimesKernels(Protocol):
    """What measures: ``compiler.tune.child.TuningChild``."""

    @property
    def executed(self) -> str:
        """How: ``"native"``, ``"modelled"`` or ``"remote"``."""
        ...

    def candidates(self, workload: str) -> tuple[KernelChoice, ...]:
        """Return the ways to compute a workload, the default first."""
        ...

    def measure(self, workload: str, choices: Sequence[KernelChoice], rounds: int) -> list[Timing]:
        """Return the timing of every choice; the first is the default kernel."""
        ...


@dataclass
class _Task:
    """A workload that is being tuned."""

    workload: Workload
    search: Search
    default_s: float
    batches: int = 0
    since_gain: int = 0
    done: bool = False

    @property
    def urgency(self) -> float:
        """Time at stake, less the longer nothing was found."""
        share = self.workload.calls * self.default_s * self.search.best[1]
        return share / (1 + self.since_gain + 0.25 * self.batches)


@dataclass
class Tuner:
    """Tunes the workloads of one model.

    Attributes:
        workloads: Of all its programs.
        hardware: What the times hold for.
        store: Where they are kept.
        budget: When to stop at the latest.
        open_timer: Starts what measures; called only if there is something to measure.
        report: Told after every batch: trials done, trials allowed (0: as many as the time lets), the best so far.
        resume: Go on with searches that a budget ended; else every search that ended is left alone.
    """

    workloads: Sequence[Workload]
    hardware: str
    store: TuningStore
    budget: TuneBudget
    open_timer: OpenTimer
    report: Report = lambda *_: None
    resume: bool = False
    _trials: int = field(default=0, init=False)
    _start: float = field(default=0.0, init=False)
    _notes: list[str] = field(default_factory=list, init=False)
    _rejected: dict[str, list[Timing]] = field(default_factory=dict, init=False)
    _tasks: list[_Task] = field(default_factory=list, init=False)
    _confirmed: dict[str, Record] = field(default_factory=dict, init=False)

    def run(self) -> Tuning:
        """Tune what is not known yet. Ctrl-C ends it, and what was found is used.

        Raises:
            UsageError: The store cannot be read or written.
            ToolchainError: Kernels cannot be timed, or a default kernel crashes.
        """
        self._start = time.monotonic()
        contents = self.store.read()
        if contents.damaged:
            self._notes.append(f"{contents.damaged} damaged lines of {self.store.path} were skipped")
        unknown = [] if self.budget.off else self._unknown(contents)
        if not unknown:
            return self._tuning(from_records(self.workloads, self.hardware, contents))
        executed, interrupted = "", False
        try:
            with self.open_timer() as timer:
                self._tune(timer, unknown, contents)
                executed = timer.executed
        except KeyboardInterrupt:
            interrupted = True
            self._notes.append(
                "interrupted: the best kernels so far are used, and the next tuning goes on from here"
            )
        self._notes.extend(_rejection(status, timings) for status, timings in self._rejected.items())
        # What another process has found meanwhile counts, too.
        found = from_records(self.workloads, self.hardware, self.store.read())
        tuned = {task.workload.key for task in self._tasks}
        kernels = tuple(_as_tuned(kernel) if kernel.workload.key in tuned else kernel for kernel in found)
        return replace(self._tuning(kernels), executed=executed, interrupted=interrupted)

    def _tuning(self, kernels: tuple[TunedKernel, ...]) -> Tuning:
        seconds = time.monotonic() - self._start
        return Tuning(
            kernels, self.hardware, self.store.path, "", self._trials, seconds, notes=tuple(self._notes)
        )

    def _unknown(self, contents: Contents) -> list[Workload]:
        """Return the workloads to tune: no search of theirs has ended, and they matter as far as that is known."""
        known = {w.key: contents.of(Key(w.key, self.hardware)) for w in self.workloads}
        times = {key: found for key, k in known.items() if (found := _default_s(k)) is not None}
        total = sum(w.calls * times.get(w.key, 0.0) for w in self.workloads)

        def open_(workload: Workload) -> bool:
            finished = known[workload.key].finished
            if finished is not None and (finished.complete or not self.resume):
                return False
            share = workload.calls * times.get(workload.key, float("inf"))
            return share >= SHARE * total or len(times) < len(known)

        return [w for w in self.workloads if open_(w)]

    def _tune(self, timer: TimesKernels, unknown: Sequence[Workload], contents: Contents) -> None:
        self._begin(timer, unknown, contents)
        while not self._spent():
            running = [task for task in self._tasks if not task.done]
            if not running:
                return
            task = max(running, key=lambda t: t.urgency)
            self._step(timer, task)
        cut = [task for task in self._tasks if not task.done]
        for task in cut:
            self._finish(timer, task, complete=False)
        if cut:
            self._notes.append(
                f"the budget ended {len(cut)} searches early: 'bitwright tune' goes on with them"
            )

    def _begin(self, timer: TimesKernels, unknown: Sequence[Workload], contents: Contents) -> None:
        """Time the defaults: they say which workloads matter."""
        tasks: list[_Task] = []
        for workload in unknown:
            if tasks and self._spent():
                break
            key = Key(workload.key, self.hardware)
            known = contents.of(key)
            candidates = timer.candidates(workload.key)
            default_s = _default_s(known)
            if default_s is None:
                (timing, *_) = self._measured(timer, key, candidates, candidates[:1], ROUNDS)
                default_s = timing.default_s
            ratios = {record.choice: record.ratio for record in known.trials.values()}
            tasks.append(_Task(workload, Search(candidates, ratios), default_s))
            self.report(self._trials, self.budget.trials or 0, workload.label)
        others = {w.key: _default_s(contents.of(Key(w.key, self.hardware))) or 0.0 for w in self.workloads}
        times = {**others, **{t.workload.key: t.default_s for t in tasks}}
        total = sum(w.calls * times[w.key] for w in self.workloads)
        self._tasks = [t for t in tasks if t.workload.calls * t.default_s >= SHARE * total]

    def _step(self, timer: TimesKernels, task: _Task) -> None:
        """Measure one batch of a task."""
        allowed = BATCH if self.budget.trials is None else min(BATCH, self.budget.trials - self._trials)
        proposed = task.search.propose(allowed)
        if proposed:
            before = task.search.best[1]
            key = Key(task.workload.key, self.hardware)
            choices = [task.search.candidates[0], *proposed]
            timings = self._measured(timer, key, task.search.candidates, choices, ROUNDS)
            task.search.observe({t.choice: t.seconds / t.default_s for t in timings if t.choice in proposed})
            task.batches += 1
            task.since_gain = 0 if task.search.best[1] < before * (1 - GAIN) else task.since_gain + 1
        if task.search.finished():
            self._finish(timer, task, complete=True)
        self.report(self._trials, self.budget.trials or 0, self._line(task))

    def _finish(self, timer: TimesKernels, task: _Task, *, complete: bool) -> None:
        """Time the leaders again, and write down which one it is."""
        task.done = True
        default = task.search.candidates[0]
        leaders = [c for c in task.search.leaders(CONFIRMED + 1) if c != default][:CONFIRMED]
        timings = timer.measure(task.workload.key, [default, *leaders], CONFIRM_ROUNDS if leaders else ROUNDS)
        good = [t for t in timings if t.status == "ok"]
        best = min(good, key=lambda t: t.seconds)
        if best.seconds > good[0].seconds * (1 - WORTH):
            best = good[0]  # no gain that a second look can see
        key = Key(task.workload.key, self.hardware)
        record = _record(key, best, task.search.candidates)
        trials = len(task.search.measured)
        self.store.append([replace(record, kind="finished", trials=trials, complete=complete)])

    def _measured(
        self,
        timer: TimesKernels,
        key: Key,
        candidates: Sequence[KernelChoice],
        choices: Sequence[KernelChoice],
        rounds: int,
    ) -> list[Timing]:
        """Measure candidates, the default first, and write down what became of them."""
        timings = timer.measure(key.workload, choices, rounds)
        new = timings if len(choices) == 1 else [t for t in timings if t.choice != choices[0]]
        # An unusable candidate still says what the default took, so that the record stands for itself.
        default_s = next(t.default_s for t in timings if t.status == "ok")
        new = [t if t.status == "ok" else replace(t, default_s=default_s) for t in new]
        self._trials += len(new)
        self.store.append([_record(key, t, candidates) for t in new])
        for timing in new:
            if timing.status != "ok":
                self._rejected.setdefault(timing.status, []).append(timing)
        return new

    def _spent(self) -> bool:
        return self.budget.spent(time.monotonic() - self._start, self._trials)

    def _line(self, task: _Task) -> str:
        """Return the best so far: of the workload just measured, and of all together."""
        default_s = sum(t.workload.calls * t.default_s for t in self._tasks)
        best_s = sum(t.workload.calls * t.default_s * t.search.best[1] for t in self._tasks)
        return (
            f"{task.workload.label}: {task.search.best[1]:.2f} of the default; all: {best_s / default_s:.2f}"
        )


def _record(key: Key, timing: Timing, candidates: Sequence[KernelChoice]) -> Record:
    rank = list(candidates).index(timing.choice)
    return Record(
        "trial",
        key,
        timing.choice,
        timing.seconds,
        timing.default_s,
        timing.status,
        rank,
        detail=timing.detail,
    )


def _rejection(status: str, timings: Sequence[Timing]) -> str:
    """Say how many candidates were unusable, and name one of them."""
    what = {
        "wrong": "computed other results than the default",
        "crashed": "crashed",
        "failed": "could not be built",
    }[status]
    first = timings[0]
    return f"{len(timings)} kernels {what} and were rejected, e.g. {first.choice.label()}: {first.detail}"


def _default_s(known: Known) -> float | None:
    """Return the default kernel's time, if anything was ever measured beside it."""
    records = [*known.trials.values(), *([known.finished] if known.finished else [])]
    return min((record.default_s for record in records), default=None)


def _as_tuned(kernel: TunedKernel) -> TunedKernel:
    return replace(kernel, source="tuned") if kernel.source == "record" else kernel
