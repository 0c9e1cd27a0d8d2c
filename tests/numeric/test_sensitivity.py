"""Losses of single sites: shared prefixes, other processes and a cache change nothing of what is measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from plan_models import CNN, MLP_ISLANDS, build

from bitwright.compiler.allocate import sensitivity as module
from bitwright.compiler.allocate import task as task_module
from bitwright.compiler.allocate.losses import LossMeter
from bitwright.compiler.allocate.parallel import runner
from bitwright.compiler.allocate.sensitivity import Sensitivity, SiteLoss, measure_sensitivity
from bitwright.compiler.allocate.suffix import cut_suffix
from bitwright.compiler.errors import DataError, ToolchainError, UsageError
from bitwright.compiler.graph.model import constant_array, node_label
from bitwright.compiler.ort.session import open_session, run
from bitwright.passes.rewriting import add_initializer, fresh_names

SAMPLES = 3


class Data:
    """Random samples of one input ``x``."""

    def __init__(self, *shape: int, count: int = SAMPLES) -> None:
        rng = np.random.default_rng(0)
        self.samples = [{"x": rng.standard_normal(shape, np.float32)} for _ in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.samples)


def coarse(model: ir.Model) -> Callable[[str, str], ir.Model]:
    """Return a builder that rounds one site's weight to ``format`` levels and quantizes its input in the graph."""

    def build_variant(site: str, fmt: str) -> ir.Model:
        variant = model.clone()
        node = next(n for n in variant.graph if node_label(n) == site)
        weight = constant_array(node.inputs[1])
        assert weight is not None
        scale = np.abs(weight).max() / int(fmt)
        fresh = fresh_names(variant)
        rounded = np.full_like(weight, np.nan) if fmt == "1" else np.rint(weight / scale) * scale
        node.replace_input_with(1, add_initializer(variant.graph, fresh("rounded"), rounded))
        scales = [
            add_initializer(variant.graph, fresh("scale"), np.float32(0.05).reshape(())),
            add_initializer(variant.graph, fresh("zero"), np.int8(0).reshape(())),
        ]
        value = node.inputs[0]
        quantize = ir.Node("", "QuantizeLinear", [value, *scales], num_outputs=1, name=fresh("q"))
        dequantize = ir.Node(
            "", "DequantizeLinear", [*quantize.outputs, *scales], num_outputs=1, name=fresh("d")
        )
        quantize.outputs[0].name, dequantize.outputs[0].name = fresh("q"), fresh("d")
        node.replace_input_with(0, dequantize.outputs[0])
        variant.graph.insert_before(node, [quantize, dequantize])
        return variant

    return build_variant


def whole(model: ir.Model, data: Data, variant: ir.Model, loss: str) -> float:
    """Return the loss by running both models from their inputs to their outputs."""
    meter = LossMeter(loss)  # type: ignore[arg-type]
    float_session, session = open_session(model), open_session(variant)
    for sample in data.samples:
        actual = run(session, sample)
        for name, exact in run(float_session, sample).items():
            meter.add(name, exact, actual[name])
    return meter.value()


CASES = {
    "cnn": (CNN, ("c1", "c2", "g"), (1, 3, 8, 8)),
    "attention": (MLP_ISLANDS, ("q", "k", "m"), (1, 4, 8)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[ir.Model, list[tuple[str, str]], Data]:
    text, sites, shape = CASES[request.param]
    return build(text), [(s, f) for s in sites for f in ("127", "7")], Data(*shape)


@pytest.mark.parametrize("loss", ["sqnr", "cosine", "kl"])
def test_equals_running_every_model_from_its_inputs(
    case: tuple[ir.Model, list[tuple[str, str]], Data], loss: str
) -> None:
    model, candidates, data = case
    build_variant = coarse(model)
    found = measure_sensitivity(model, candidates, build_variant, data, Sensitivity(loss=loss))  # type: ignore[arg-type]
    assert [(f.site, f.format) for f in found] == candidates
    for each in found:
        exact = whole(model, data, build_variant(each.site, each.format), loss)
        # Fusions differ where the graph is cut: a few float32 roundings, squared.
        assert each.loss == pytest.approx(exact, rel=1e-3, abs=1e-12)
        assert each.loss > 0
    assert all(fine.loss < rough.loss for fine, rough in zip(found[::2], found[1::2], strict=True))


def test_only_what_follows_the_site_is_run() -> None:
    model = build(CNN)
    variant = coarse(model)("c2", "7")
    suffix = cut_suffix(model, variant)
    assert suffix is not None
    assert suffix.inputs == ("r1",)
    assert suffix.outputs == ("y",)
    assert "c1" not in {o.name for n in suffix.model.graph for o in n.outputs}
    assert cut_suffix(model, model.clone()) is None


def test_one_run_a_candidate_and_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"float": 0, "candidate": 0}

    def counting(kind: str) -> Callable[..., dict[str, np.ndarray]]:
        def counted(*args: object) -> dict[str, np.ndarray]:
            calls[kind] += 1
            return run(*args)  # type: ignore[arg-type]

        return counted

    monkeypatch.setattr(module, "run", counting("float"))
    monkeypatch.setattr(task_module, "run", counting("candidate"))
    model, data = build(CNN), Data(1, 3, 8, 8)
    candidates = [(s, f) for s in ("c1", "c2", "g") for f in ("127", "31", "7")]
    measure_sensitivity(model, candidates, coarse(model), data)
    # The float model: once a sample, and one sample before to learn the sizes.
    assert calls == {"float": SAMPLES + 1, "candidate": len(candidates) * SAMPLES}


def test_blocks_of_any_size_give_the_same_losses(case: tuple[ir.Model, list[tuple[str, str]], Data]) -> None:
    model, candidates, data = case
    one = measure_sensitivity(model, candidates, coarse(model), data)
    many = measure_sensitivity(model, candidates, coarse(model), data, Sensitivity(block_bytes=1))
    for a, b in zip(one, many, strict=True):
        assert (a.site, a.format) == (b.site, b.format)
        assert a.loss == pytest.approx(b.loss, rel=1e-3, abs=1e-12)


def test_other_processes_measure_the_same(case: tuple[ir.Model, list[tuple[str, str]], Data]) -> None:
    model, candidates, data = case
    here = measure_sensitivity(model, candidates, coarse(model), data)
    assert measure_sensitivity(model, candidates, coarse(model), data, Sensitivity(workers=2)) == here


def test_a_candidate_that_is_not_finite_loses_everything() -> None:
    model, data = build(CNN), Data(1, 3, 8, 8)
    (broken, fine) = measure_sensitivity(model, [("c1", "1"), ("c1", "7")], coarse(model), data)
    assert math.isinf(broken.loss)
    assert broken.reason == "output 'y' is not finite"
    assert math.isfinite(fine.loss) and fine.reason == ""


def test_a_candidate_that_cannot_be_run_loses_everything() -> None:
    model, data = build(CNN), Data(1, 3, 8, 8)

    def unknown(site: str, fmt: str) -> ir.Model:
        variant = model.clone()
        next(n for n in variant.graph if node_label(n) == site).op_type = "Nonsense"
        return variant

    (found,) = measure_sensitivity(model, [("c2", "7")], unknown, data)
    assert math.isinf(found.loss)
    assert "Nonsense" in found.reason


def test_a_site_that_changes_nothing_loses_nothing() -> None:
    model, data = build(CNN), Data(1, 3, 8, 8)
    found = measure_sensitivity(model, [("c1", "float")], lambda *_: model.clone(), data)
    assert found == [SiteLoss("c1", "float", 0.0)]


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Path, list[SiteLoss]]:
    model, data = build(CNN), Data(1, 3, 8, 8)
    cache = tmp_path / "losses.jsonl"
    return cache, measure_sensitivity(model, CANDIDATES, coarse(model), data, Sensitivity(cache=cache))


CANDIDATES = [("c1", "7"), ("c2", "1"), ("g", "7")]


def rerun(
    cache: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0, data: Data | None = None
) -> tuple[int, list[SiteLoss]]:
    """Measure again and count how many candidates had to be run."""
    tasks = 0

    def counted(task: task_module.Task) -> task_module.Outcome:
        nonlocal tasks
        tasks += 1
        return task_module.run_task(task)

    monkeypatch.setattr("bitwright.compiler.allocate.parallel.run_task", counted)
    model = build(CNN, seed)
    found = measure_sensitivity(
        model, CANDIDATES, coarse(model), data or Data(1, 3, 8, 8), Sensitivity(cache=cache)
    )
    return tasks, found


def test_a_second_run_measures_nothing(
    measured: tuple[Path, list[SiteLoss]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, before = measured
    assert rerun(cache, monkeypatch) == (0, before)
    assert math.isinf(before[1].loss)
    assert len([json.loads(line) for line in cache.read_text().split("\n") if line]) == 3


def test_a_killed_run_goes_on(measured: tuple[Path, list[SiteLoss]], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, before = measured
    lines = cache.read_bytes().split(b"\n")
    cache.write_bytes(b"\n".join([b"{nonsense", *lines[:2], lines[2][: len(lines[2]) // 2]]))
    assert rerun(cache, monkeypatch) == (2, before)
    assert rerun(cache, monkeypatch) == (0, before)


def test_another_model_or_other_data_are_measured_anew(
    measured: tuple[Path, list[SiteLoss]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, _ = measured
    assert rerun(cache, monkeypatch, seed=1)[0] == 3
    assert rerun(cache, monkeypatch, data=Data(1, 3, 8, 8, count=2))[0] == 3


METRIC = """
import numpy as np

def mean_of_first(run):
    x = np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 3, 8, 8)
    return float(run({"x": x})["y"][0, 0])
"""


def test_the_users_metric_is_a_loss(tmp_path: Path) -> None:
    script = tmp_path / "metric.py"
    script.write_text(METRIC)
    model = build(CNN)
    how = Sensitivity(loss="eval", evaluate=f"{script}:mean_of_first")
    (found, broken) = measure_sensitivity(
        model, [("c2", "7"), ("c2", "1")], coarse(model), Data(1, 3, 8, 8), how
    )
    x = {"x": np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 3, 8, 8)}
    before, after = (float(run(open_session(m), x)["y"][0, 0]) for m in (model, coarse(model)("c2", "7")))
    assert found.loss == pytest.approx((before - after) / before, abs=1e-6)
    assert math.isinf(broken.loss)
    assert "nan" in broken.reason


def test_wrong_questions_are_refused() -> None:
    model = build(CNN)
    with pytest.raises(UsageError, match="did you mean 'sqnr'"):
        Sensitivity(loss="sqnrr")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="belong together"):
        Sensitivity(loss="eval")
    with pytest.raises(DataError, match="no samples"):
        measure_sensitivity(model, CANDIDATES, coarse(model), Data(1, 3, 8, 8, count=0))
    with pytest.raises(UsageError, match="tcp://"), runner(scheduler="localhost:8786"):
        pass
    with pytest.raises(UsageError, match="1 or more"), runner(workers=0):
        pass


def test_a_killed_worker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def submit(self, *_: object) -> Future[object]:
            future: Future[object] = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

        def shutdown(self, **_: object) -> None:
            pass

    monkeypatch.setattr("bitwright.compiler.allocate.parallel.ProcessPoolExecutor", Killed)
    model = build(CNN)
    with pytest.raises(ToolchainError, match="ended before it finished"):
        measure_sensitivity(model, CANDIDATES, coarse(model), Data(1, 3, 8, 8), Sensitivity(workers=2))


def test_a_missing_dask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with (
        pytest.raises(ToolchainError, match=r"bitwright\[distributed\]"),
        runner(scheduler="tcp://localhost:1"),
    ):
        pass


def test_a_cluster_measures_the_same(case: tuple[ir.Model, list[tuple[str, str]], Data]) -> None:
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    model, candidates, data = case
    here = measure_sensitivity(model, candidates, coarse(model), data)
    # Workers are threads here, but everything reaches them through sockets.
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, protocol="tcp", dashboard_address=None
    ) as cluster:
        how = Sensitivity(scheduler=cluster.scheduler_address)
        there = measure_sensitivity(model, candidates, coarse(model), data, how)
    assert there == here


def test_an_unreachable_scheduler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="dask is not installed")
    monkeypatch.setattr("bitwright.compiler.allocate.parallel.CONNECT_S", 1)
    match = r"no dask scheduler answers at tcp://127\.0\.0\.1:9"
    with pytest.raises(ToolchainError, match=match), runner(scheduler="tcp://127.0.0.1:9"):
        pass
