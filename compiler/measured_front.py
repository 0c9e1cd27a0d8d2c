"""Points of a front built as real models: what they lose and how large they are, measured.

The solver adds up what layers lose one by one. That is close, but it is not the loss of the model; whole-model half
precision is no choice of a layer at all. So the points, one format everywhere, and half precision are built and
compared by what they really lose on the samples that judge formats.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitwright.compiler import accuracy, frontend
from bitwright.compiler.allocate.accuracy_loop import relative_drop
from bitwright.compiler.allocate.frontier import FrontPoint, Measured
from bitwright.compiler.allocate.losses import LossMeter
from bitwright.compiler.allocate.problem import FLOAT, Problem, Totals
from bitwright.compiler.allocation import apply_formats
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import DataError, ModelError
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.ingest.evaluator import load_eval
from bitwright.compiler.ort.session import SessionConfig, callable_model, local_config, open_session, run
from bitwright.compiler.plan.latency import predict
from bitwright.compiler.plan.planner import RuntimeName, runtime_of
from bitwright.compiler.plan.units import FormatChoice

Judge = Callable[[Path], float]


def measure_points(
    c: Compilation,
    runtime: RuntimeName,
    problem: Problem,
    points: Sequence[FrontPoint],
    *,
    wholes: bool = True,
) -> list[FrontPoint]:
    """Build every point as a model and measure it.

    Args:
        c: The compilation that the problem was made of; its formats are left as they were.
        runtime: Which of the two runtimes.
        problem: What the points were chosen from.
        points: Assignments, each measured once.
        wholes: Measure the whole model in the half-precision formats of the runtime, too.

    Returns:
        The points with ``measured`` set, the whole models behind them.
    """
    unique = list({tuple(sorted(p.formats.items())): p for p in points}.values())
    halves = runtime_of(c.profile, runtime).float_formats if wholes else ()
    wanted = [*unique, *(_whole(problem, fmt) for fmt in halves)]
    formats, found = c.formats, list[FrontPoint]()
    try:
        with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
            bench = _Bench(c, runtime, problem, Path(folder))
            for number, point in enumerate(wanted):
                c.progress.step(number, len(wanted), "points built and measured")
                found += bench.measured(point, formats)
    finally:
        c.formats = formats
        c.selection = frontend.reselect(c, runtime)
    return found


def _whole(problem: Problem, fmt: str) -> FrontPoint:
    return FrontPoint({g.name: fmt for g in problem.groups}, Totals(), math.nan, whole=fmt)


def whole_choice(fmt: str, formats: FormatChoice) -> FormatChoice:
    """Return the choice of a half-precision format for everything; tables keep their formats."""
    return FormatChoice((fmt,), (fmt, *formats.others), formats.tables)


class _Bench:
    """Builds and judges points, one after the other."""

    def __init__(self, c: Compilation, runtime: RuntimeName, problem: Problem, folder: Path) -> None:
        self._c, self._runtime, self._problem, self._folder = c, runtime, problem, folder
        self._config = local_config(c.profile.runtimes.onnxruntime, threads=c.options.threads)
        assert c.model is not None
        path = folder / "float.onnx"
        save_model(c.model, path)
        by_metric = c.options.loss == "eval"
        self._judge = (
            _metric_judge(c, path, self._config) if by_metric else _output_judge(c, path, self._config)
        )

    def measured(self, point: FrontPoint, formats: FormatChoice) -> list[FrontPoint]:
        """Return the point with what was measured; nothing if ONNX Runtime does not load a model in half precision."""
        c = self._c
        if point.whole is None:
            apply_formats(c, self._runtime, self._problem, point.formats)
        else:
            c.formats = whole_choice(point.whole, formats)
        accuracy.requantize(c, self._runtime, [])
        assert c.quantized is not None and c.selection is not None
        path = self._folder / "point.onnx"
        files = save_model(c.quantized, path)
        try:
            loss = self._judge(path)
        except (DataError, ModelError):
            if point.whole is None:
                raise
            return []
        size = sum(file.stat().st_size for file in files)
        found = replace(point, measured=Measured(loss, size))
        if point.whole is None:
            return [found]
        seconds = predict(c.selection, c.profile, self._runtime, c.shapes).seconds
        return [replace(found, totals=Totals(loss=loss, latency_s=seconds, weight_bytes=_constants(c)))]


def _constants(c: Compilation) -> float:
    assert c.quantized is not None
    values = c.quantized.graph.initializers.values()
    return float(sum(v.const_value.nbytes for v in values if v.const_value is not None))


def _output_judge(c: Compilation, exact: Path, config: SessionConfig) -> Judge:
    """Return what compares outputs with the float model's, sample by sample: nothing is kept."""
    reference = open_session(exact, config)

    def judge(path: Path) -> float:
        candidate, meter = open_session(path, config), LossMeter(c.options.loss)  # type: ignore[arg-type]
        for feeds in frontend.judging_samples(c).batches(1):
            outputs = run(reference, feeds)
            for name, actual in run(candidate, feeds).items():
                meter.add(name, np.asarray(outputs[name]), np.asarray(actual))
        return meter.value()

    return judge


def _metric_judge(c: Compilation, exact: Path, config: SessionConfig) -> Judge:
    """Return what evaluates the user's metric; the loss is its relative drop."""
    assert c.options.evaluate is not None
    metric = load_eval(c.options.evaluate)

    def value(path: Path) -> float:
        return metric(callable_model(open_session(path, config)))

    reference = value(exact)
    return lambda path: relative_drop(reference, value(path))


def better_by_measure(points: Sequence[FrontPoint], cost: Callable[[FrontPoint], float]) -> list[FrontPoint]:
    """Return the measured points than which no other is cheaper and loses no more, the cheapest first."""
    kept: list[FrontPoint] = []
    for point in sorted(points, key=lambda p: (cost(p), measured_loss(p))):
        if not kept or measured_loss(point) < measured_loss(kept[-1]):
            kept.append(point)
    return kept


def measured_loss(point: FrontPoint) -> float:
    """Return what a point was measured to lose; float computes what it computes, whatever rounding says."""
    assert point.measured is not None
    exact = point.whole is None and set(point.formats.values()) == {FLOAT}
    return 0.0 if exact else max(point.measured.loss, 0.0)


def measured_by_format(
    points: Sequence[FrontPoint], uniform: Mapping[str, FrontPoint]
) -> dict[str, FrontPoint]:
    """Return the measured points of one format everywhere, half precision included."""
    known = {tuple(sorted(p.formats.items())): p for p in points if p.whole is None}
    found = {fmt: known.get(tuple(sorted(p.formats.items())), p) for fmt, p in uniform.items()}
    return found | {p.whole: p for p in points if p.whole is not None}
