"""Plans built for real and measured: bytes of the file, seconds, distance from float, the task's metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime as ort
from zoo import Feeds, ZooModel

from bitwright.compiler.accuracy import requantize
from bitwright.compiler.allocate.frontier import FrontPoint
from bitwright.compiler.allocate.losses import LossMeter
from bitwright.compiler.allocate.problem import Problem
from bitwright.compiler.allocation import apply_formats
from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.measured_front import whole_choice
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session, run

RUNTIME = "onnxruntime"
VALIDATION = 512
SESSIONS, ROUNDS, ROUND_S = 9, 5, 0.03


@dataclass
class Built:
    """A plan and what was predicted and measured of it.

    Attributes:
        name: Where it comes from, e.g. ``latency front 3`` or ``uniform int8``.
        kind: ``front``, ``uniform``, ``greedy`` or ``chosen``.
        file: The model's file name.
        predicted_s: Seconds, None where nothing predicts them.
        predicted_loss: None likewise.
        size: Bytes of the file.
        seconds: Measured seconds of one call.
        loss: Measured noise over signal of the outputs on the metric's samples.
        metric: The task's.
    """

    name: str
    kind: str
    file: str
    predicted_s: float | None
    predicted_loss: float | None
    size: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    metric: float = 0.0

    def as_plain(self) -> dict[str, object]:
        """Return it for JSON."""
        return asdict(self)


class Workshop:
    """Builds the plans of one model."""

    def __init__(self, c: Compilation, folder: Path) -> None:
        self._c, self._folder, self._formats = c, folder, c.formats
        self._known: dict[object, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def point(self, problem: Problem, point: FrontPoint) -> str:
        """Build a point; returns the file's name, the same one for the same formats."""
        key = point.whole or tuple(sorted(point.formats.items()))
        if key not in self._known:
            # As they were before the last plan, which may have been a whole model.
            self._c.formats = self._formats
            if point.whole is None:
                apply_formats(self._c, RUNTIME, problem, point.formats)
            else:
                self._c.formats = whole_choice(point.whole, self._formats)
            self._known[key] = self._write(f"plan-{len(self._known):02d}.onnx")
        return self._known[key]

    def _write(self, name: str) -> str:
        requantize(self._c, RUNTIME, [])
        assert self._c.quantized is not None
        write_model_atomically(self._c.quantized, self._folder / name, {})
        return name


def opener(c: Compilation, path: Path, *, plain: bool = False) -> Callable[[], ort.InferenceSession]:
    """Return what opens a fresh one-thread session with the options of the deployment, or with none."""
    config = SessionConfig() if plain else config_for(c.profile.runtimes.onnxruntime, threads=1)
    return lambda: open_session(path, config)


def _seconds(session: ort.InferenceSession, feeds: Feeds) -> float:
    """Return the median over rounds of the CPU seconds that one call takes of this thread, which computes alone."""
    run(session, feeds)
    start = time.thread_time()
    run(session, feeds)
    calls = max(1, int(ROUND_S / max(time.thread_time() - start, 1e-6)))
    found = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(calls):
            run(session, feeds)
        found.append((time.thread_time() - start) / calls)
    return median(found)


def time_all(openers: Sequence[Callable[[], ort.InferenceSession]], feeds: Feeds) -> list[float]:
    """Return the seconds of a call of each model: medians over fresh sessions, opened in turns.

    The order changes from turn to turn: what a process did before changes where the buffers of a session lie.
    """
    order = np.random.default_rng(0)
    found: list[list[float]] = [[] for _ in openers]
    for _ in range(SESSIONS):
        for number in order.permutation(len(openers)):
            found[number].append(_seconds(openers[number](), feeds))
    return [median(seconds) for seconds in found]


def write_validation(model: ZooModel, reference: ort.InferenceSession, folder: Path) -> Path:
    """Write samples of every other call of the metric, one file each; the allocator judges formats by them."""
    calls: list[Feeds] = []

    def record(feeds: Feeds) -> Feeds:
        calls.append(feeds)
        return run(reference, feeds)

    model.evaluate(record)
    samples = [row for feeds in calls[::2] for row in _rows(feeds)]
    folder.mkdir(parents=True, exist_ok=True)
    count = min(VALIDATION, len(samples))
    for number in range(count):
        np.savez(folder / f"{number:03d}.npz", **samples[number * len(samples) // count])
    return folder


def _rows(feeds: Feeds) -> list[Feeds]:
    """Take a batch apart, without the padding of shorter rows."""
    mask = feeds.get("attention_mask")
    count = len(next(iter(feeds.values())))
    ends = [None] * count if mask is None else [int(m.sum()) for m in mask]
    return [
        {n: a[k : k + 1] if e is None else a[k : k + 1, :e] for n, a in feeds.items()}
        for k, e in enumerate(ends)
    ]


class Judge:
    """Runs a task's metric; compares the outputs of the calls that validated nothing with the float model's."""

    def __init__(self, model: ZooModel, reference: ort.InferenceSession) -> None:
        self._model = model
        self._exact: list[Feeds] = []

        def record(feeds: Feeds) -> Feeds:
            self._exact.append(run(reference, feeds))
            return self._exact[-1]

        self.float_metric = model.evaluate(record)

    def __call__(self, session: ort.InferenceSession) -> tuple[float, float]:
        """Return noise over signal, and the metric."""
        meter, exact = LossMeter("sqnr"), enumerate(self._exact)

        def compare(feeds: Feeds) -> Feeds:
            outputs = run(session, feeds)
            number, found = next(exact)
            for name, expected in found.items() if number % 2 else ():
                meter.add(name, np.asarray(expected), np.asarray(outputs[name]))
            return outputs

        metric = self._model.evaluate(compare)
        return meter.value(), metric
