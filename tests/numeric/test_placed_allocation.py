"""Time under an allocation: the pairwise model of a placement, and limits that the whole placement keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from bitwright.compiler import frontend
from bitwright.compiler.allocate.frontier import FrontPoint
from bitwright.compiler.allocate.problem import Budget, Choice, Cost, Group, Problem, Totals, totals
from bitwright.compiler.allocation import allocate_placed, greedy_or_none, placed_seconds, polish
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import InfeasibleBudgetError
from bitwright.compiler.interactions import boundaries_between
from bitwright.compiler.options import Options
from bitwright.compiler.plan.latency import predict
from bitwright.compiler.plan.planner import plan_selection
from bitwright.compiler.plan.units import FormatChoice
from bitwright.compiler.sweep import RESOLUTION, _apart, front_of, problem_of
from bitwright.compiler.variants import Site, Variants
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Measured, MeasuredTimes

RESIDUAL = """
<ir_version: 8, opset_import: ["" : 17]>
residual (float[1,16,16,16] x) => (float[1,16,16,16] y)
{
  a = Conv<pads=[1,1,1,1]>(x, w0)
  ar = Relu(a)
  b = Conv<pads=[1,1,1,1]>(ar, w1)
  s = Add(b, ar)
  c = Conv<pads=[1,1,1,1]>(s, w2)
  t = Add(c, s)
  y = Conv<pads=[1,1,1,1]>(t, w3)
}
"""
LAYERS = """
<ir_version: 8, opset_import: ["" : 17]>
layers (float[1,64,256] x) => (float[1,64,256] y)
{
  a = MatMul(x, w0)
  ga = Tanh(a)
  b = MatMul(ga, w1)
  gb = Tanh(b)
  y = MatMul(gb, w2)
}
"""
NORMALIZED = """
<ir_version: 8, opset_import: ["" : 17]>
norm (float[1,4,64] x) => (float[1,4,64] y)
{
  n = LayerNormalization(x, gain, shift)
  a = MatMul(n, wa)
  g = Tanh(a)
  y = MatMul(g, wb)
}
"""


def model_of(text: str, weights: Mapping[str, tuple[int, ...]]) -> ir.Model:
    rng = np.random.default_rng(3)
    proto = onnx.parser.parse_model(text)
    for name, shape in weights.items():
        array = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) + 1)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def test_the_pairs_know_what_a_residual_region_saves() -> None:
    model = model_of(RESIDUAL, {f"w{k}": (16, 16, 3, 3) for k in range(4)})
    profile = load_profile("x86-amx")
    shapes = {v.name or "": tuple(v.shape.numpy()) for n in model.graph for v in n.outputs if v.shape}
    shapes["x"] = (1, 16, 16, 16)

    def selection(formats: Mapping[str, str]):  # type: ignore[no-untyped-def]
        by_node = dict.fromkeys("abcy", "float") | dict(formats)
        choice = FormatChoice(("float",), ("int8",), ("float",), by_node)
        return plan_selection(model, profile, "onnxruntime", shapes, formats=choice)

    def seconds(formats: Mapping[str, str]) -> float:
        return predict(selection(formats), profile, "onnxruntime", shapes).seconds

    everything = dict.fromkeys("abcy", "int8")
    current = selection(everything)
    sites = [Site(u, ("int8", "float")) for u in current.units if u.name in everything]
    base = seconds({})
    costs = {
        (n, f): Cost(seconds({n: f}) - base if f != "float" else 0.0)
        for n in "abcy"
        for f in ("int8", "float")
    }
    groups = tuple(
        Group(n, (n,), tuple(Choice(f, 0.0, costs[n, f].latency_s) for f in ("int8", "float")))
        for n in "abcy"
    )
    found = boundaries_between(current, sites, groups, costs, seconds)
    problem = Problem(groups, tuple(found), fixed=Totals(latency_s=base))

    def modelled(chosen: str) -> float:
        return totals(problem, {n: "int8" if n in chosen else "float" for n in "abcy"}).latency_s

    # Layers alone are exact, and so is, up to the fit, the region as a whole; layer by layer it would be far off.
    additive = base + sum(costs[n, "int8"].latency_s for n in "abcy")
    exact = seconds(everything)
    assert abs(additive - exact) > 0.2 * exact
    assert modelled("") == base
    assert modelled("a") == pytest.approx(seconds({"a": "int8"}), rel=1e-9)
    assert modelled("abcy") == pytest.approx(exact, rel=0.03)
    # What three layers around an Add save is no sum of pairs: the fit is good where plans are, near the whole region.
    errors = []
    for chosen in ("abcy", "bcy", "acy", "aby", "abc"):
        true = seconds(dict.fromkeys(chosen, "int8"))
        alone = base + sum(costs[n, "int8"].latency_s for n in chosen)
        errors.append((abs(modelled(chosen) - true), abs(alone - true)))
    fitted, added = np.mean(errors, axis=0)
    assert fitted < 0.85 * added, (fitted, added)


def ladder(layers: int = 12) -> Problem:
    groups = [
        Group(f"g{k}", (f"g{k}",), (Choice("int8", 0.01 * (k + 1), 1e-3), Choice("float", 0.0, 3e-3)))
        for k in range(layers)
    ]
    return Problem(tuple(groups))


@pytest.mark.parametrize(
    "bend", [lambda s: 1.1 * s, lambda s: 0.9 * s, lambda s: s + 2e-3, lambda s: s**1.02]
)
def test_a_limit_is_kept_by_the_placement_and_used_up(bend: Callable[[float], float]) -> None:
    problem, limit = ladder(), 24.5e-3

    def seconds(formats: Mapping[str, str]) -> float:
        return bend(totals(problem, formats).latency_s)

    found = allocate_placed(problem, Budget(latency_s=limit), "loss", seconds)
    assert found.totals.latency_s == seconds(found.formats) <= limit
    # One more layer in float, which takes 2 ms more, would not have been within the limit.
    assert bend(totals(problem, found.formats).latency_s + 2e-3) > limit
    assert all(p.used == found.totals.latency_s for p in found.prices)


def test_polishing_moves_what_loses_most_as_far_as_the_limit_goes() -> None:
    problem = ladder()
    start = {g.name: "int8" for g in problem.groups}

    def seconds(formats: Mapping[str, str]) -> float:
        return totals(problem, formats).latency_s

    found = polish(problem, Budget(latency_s=24.5e-3), start, seconds)
    assert [g for g, fmt in found.items() if fmt == "float"] == [f"g{k}" for k in range(6, 12)]
    assert polish(problem, Budget(latency_s=24.5e-3), start, seconds, most=0) == start


def test_greedy_selection_is_never_better_than_an_allocation(tmp_path: Path) -> None:
    ir.save(model_of(LAYERS, {f"w{k}": (256, 256) for k in range(3)}), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 64, 256)).astype(np.float32)} for _ in range(4)]
    options = Options(model=tmp_path / "m.onnx", target="x86-avx2", data=samples, recipe="mixed")
    speeds = {"float": 1e-11, "w8": 7e-12, "w4": 5e-12, "int8": 2e-12, "w4a8": 2e-12}
    fits = {
        f: {"call_s": 1e-6, "mac_s": s, "byte_s": 0.0, "points": 9, "error": 0.1} for f, s in speeds.items()
    }
    times = MeasuredTimes.model_validate({"machine": "m", "date": "2026-01-01", "fits": {"gemm": fits}})
    measured = {"measured": Measured(onnxruntime=times)}
    c = Compilation(options, load_profile("x86-avx2").model_copy(update=measured))
    problem = problem_of(c, "onnxruntime")
    front = front_of(c, "onnxruntime", problem, "latency_s", 6)
    variants = Variants(c, "onnxruntime")
    assert len(front.points) > 2
    ends = front.points[0].totals.latency_s, front.points[-1].totals.latency_s
    compared = 0
    for share in np.linspace(0.1, 0.9, 7):
        budget = Budget(latency_s=float(ends[0] + share * (ends[1] - ends[0])))
        found = allocate_placed(problem, budget, "loss", lambda f: placed_seconds(variants, problem, f))
        assert budget.met_by(found.totals)
        chosen = greedy_or_none(problem, budget)
        if chosen is not None and placed_seconds(variants, problem, chosen) <= budget.limits()["latency_s"]:
            compared += 1
            assert found.totals.loss <= totals(problem, chosen).loss * (1 + 1e-9)
    assert compared > 3


def test_a_limit_that_only_the_model_keeps_is_infeasible() -> None:
    problem = ladder()
    with pytest.raises(InfeasibleBudgetError):
        allocate_placed(
            problem, Budget(latency_s=13e-3), "loss", lambda f: totals(problem, f).latency_s + 2e-3
        )


def test_without_a_limit_the_seconds_are_those_of_the_placement() -> None:
    found = allocate_placed(ladder(), Budget(loss=0.2), "latency_s", lambda _: 0.5)
    assert found.totals.latency_s == found.value == 0.5
    assert 0 <= found.gap < 0.1


def test_points_closer_than_times_are_known_are_one() -> None:
    ends = [(1.0, 0.9), (1.001, 0.5), (1.2, 0.4), (1.2 * (1 + 2 * RESOLUTION), 0.3)]
    points = [FrontPoint({}, Totals(loss=loss, latency_s=s), 0.0) for s, loss in ends]
    kept = _apart(points)
    assert [p.totals.loss for p in kept] == [0.5, 0.4, 0.3]
    assert all(a.totals.latency_s < b.totals.latency_s for a, b in pairwise(kept))


def test_a_weight_that_a_rewrite_replaced_counts_no_bytes(tmp_path: Path) -> None:
    model = model_of(NORMALIZED, {"wa": (64, 128), "wb": (128, 64)})
    gain = np.ones(64, np.float32)
    gain[5] = 60.0  # an outlier, so that scales are moved into wa
    for name, array in (("gain", gain), ("shift", np.zeros(64, np.float32))):
        tensor = ir.tensor(array, name=name)
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = tensor
        model.graph.initializers[name] = value
    ir.save(model, tmp_path / "m.onnx")
    full = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    rng = np.random.default_rng(0)
    samples = [{"x": rng.standard_normal((1, 4, 64)).astype(np.float32)} for _ in range(8)]
    options = Options(model=tmp_path / "m.onnx", target="x86-avx512-vnni", data=samples, recipe="mixed")
    c = Compilation(options, load_profile(options.target))
    problem = problem_of(c, "onnxruntime")
    assert any(c.migrated.values()), "nothing was rewritten: the test shows nothing"
    everything = totals(problem, {g.name: "float" for g in problem.groups}).weight_bytes
    assert full <= everything < 1.06 * full  # disassembled channels may add 3 % to each of two layers


def test_random_data_has_the_sizes_that_are_asked_for(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> m (float[N,8] x) => (float[N,8] y) { y = Relu(x) }"""
    (tmp_path / "m.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    options = Options(model=tmp_path / "m.onnx", target="x86-avx2", random_data=True, dims={"N": 5})
    c = Compilation(options, load_profile(options.target))
    frontend.ingest(c, [])
    assert c.dataset is not None
    assert next(iter(c.dataset.batches(1)))["x"].shape == (5, 8)
