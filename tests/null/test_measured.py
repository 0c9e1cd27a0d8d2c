"""Measured times in a profile: strictness, look-up, fits, and what a prediction adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.plan.cost import boundary, call_traffic, estimate_call, quantize_s
from bitwright.compiler.plan.energy import energy_j, placement_energy_j
from bitwright.compiler.plan.latency import chains, crossings, formats_before, predict, predict_float
from bitwright.compiler.plan.measured import Estimate, Point, fit_work
from bitwright.compiler.plan.memory import peak_activation_bytes
from bitwright.compiler.plan.observations import Observation, tables
from bitwright.compiler.plan.planner import plan_selection
from bitwright.compiler.plan.signature import DEQUANTIZE, QUANTIZE, fit_names, signature
from bitwright.compiler.plan.units import FormatChoice
from bitwright.compiler.probing.blocks import blocks
from bitwright.passes.rewriting import add_initializer
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Energy, Measured, MeasuredTimes, Profile, WorkFit
from bitwright.targets.verbs import check, dump

RUNTIME = "onnxruntime"
NET = """<ir_version: 10, opset_import: ["" : 20]>
net (float[1,8,16,16] x, float[8,8,3,3] w0, float[8,8,3,3] w1, float[8,8,3,3] w2) => (float[1,8,16,16] y) {
  a = Conv<pads=[1,1,1,1]>(x, w0)
  r = Relu(a)
  b = Conv<pads=[1,1,1,1]>(r, w1)
  y = Conv<pads=[1,1,1,1]>(b, w2)
}"""
CONV_RELU = "1x8x16x16,c8x8x3x3>1x8x16x16+Relu"


def net() -> ir.Model:
    """Return NET with constant weights, nodes named after their outputs."""
    model = ir.from_proto(onnx.parser.parse_model(NET))
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        array = np.full((8, 8, 3, 3), 0.1, np.float32)
        value.replace_all_uses_with(add_initializer(model.graph, value.name or "", array))
    for node in model.graph:
        node.name = node.outputs[0].name
        node.outputs[0].shape, node.outputs[0].dtype = ir.Shape([1, 8, 16, 16]), ir.DataType.FLOAT
    return model


@pytest.fixture
def plain() -> Profile:
    return load_profile("x86-amx")


def with_times(profile: Profile, **changes: object) -> Profile:
    times = MeasuredTimes.model_validate({"machine": "m", "date": "2026-01-01", **changes})
    return profile.model_copy(update={"measured": Measured(onnxruntime=times)})


SHAPES = dict.fromkeys("xarby", (1, 8, 16, 16))


def test_signature_says_what_decides_the_time() -> None:
    model = net()
    first, relu = model.graph.node(0), model.graph.node(1)
    assert signature(first, {}, (relu,), writes="q") == f"{CONV_RELU} q"
    assert signature(relu, {}) == "1x8x16x16>1x8x16x16"
    assert fit_names(first, {}) == ("conv",)
    assert fit_names(relu, {}) == ("Relu", "elementwise")


def test_exact_time_comes_first_then_the_fit_then_the_roofline(plain: Profile) -> None:
    conv = net().graph.node(0)
    fit = WorkFit(call_s=1e-6, mac_s=1e-12, byte_s=0.0, points=9, error=0.1)
    fits = {"conv": {"int8": fit}}
    times = {"Conv": {"int8": {f"{CONV_RELU} q": 7e-6}}}
    macs = 8 * 16 * 16 * 72

    def found(profile: Profile, fmt: str = "int8") -> Estimate:
        return estimate_call(conv, {}, profile, RUNTIME, fmt)

    assert found(with_times(plain, times=times, fits=fits)) == Estimate(7e-6, "measured")
    near = found(with_times(plain, fits=fits))
    assert near.source == "fitted" and near.seconds == pytest.approx(1e-6 + macs * 1e-12)
    # Neither the operator's other format nor the other runtime was measured.
    assert found(with_times(plain, times=times, fits=fits), "float").source == "modelled"
    assert found(plain).source == "modelled"
    other = estimate_call(conv, {}, with_times(plain, times=times), "artifact", "int8")
    assert other.source == "modelled"


def test_a_call_that_writes_the_other_type_is_nearer_than_a_fit(plain: Profile) -> None:
    profile = with_times(plain, times={"Conv": {"int8": {f"{CONV_RELU} f": 5e-6}}})
    assert estimate_call(net().graph.node(0), {}, profile, RUNTIME, "int8").seconds == 5e-6


def test_a_layer_of_a_few_more_channels_is_scaled_from_its_neighbour(plain: Profile) -> None:
    fits = {"conv": {"float": {"call_s": 1.0, "mac_s": 0.0, "byte_s": 0.0, "points": 9, "error": 0.1}}}
    conv = net().graph.node(0)
    near, far = "1x8x16x16,c8x7x3x3>1x8x16x16+Relu", "1x8x32x32,c8x8x3x3>1x8x32x32+Relu"
    profile = with_times(plain, times={"Conv": {"float": {near: 1e-5, far: 1e-3}}}, fits=fits)
    found = estimate_call(conv, {}, profile, RUNTIME, "float")
    assert found.source == "fitted"
    assert found.seconds == pytest.approx(1e-5 * (2 * 2048 + 576) / (2 * 2048 + 504))
    # Another form (nothing fused behind) or twice the size is no neighbour.
    for key in (far, near.removesuffix("+Relu"), f"{near} q"):
        profile = with_times(plain, times={"Conv": {"float": {key: 1e-5}}}, fits=fits)
        assert estimate_call(conv, {}, profile, RUNTIME, "float").seconds == 1.0


def test_a_call_is_known_by_the_company_it_keeps(plain: Profile) -> None:
    model = net()
    profile = with_times(
        plain, times={"Conv": {"float": {CONV_RELU: 3e-5, f"{CONV_RELU} beside int8": 2e-5}}}
    )

    def seconds(neighbour: str) -> float:
        return estimate_call(model.graph.node(0), {}, profile, RUNTIME, "float", neighbour=neighbour).seconds

    assert seconds("int8") == 2e-5
    assert seconds("w4") == seconds("") == 3e-5  # not measured: the mean over all neighbours
    keep = FormatChoice(("int8",), ("int8",), ("int8",), {"b": "float"})
    selection = plan_selection(model, profile, RUNTIME, SHAPES, formats=keep)
    everything = chains(selection, profile.runtimes.onnxruntime)
    before = dict(zip([c.unit.name for c in everything], formats_before(everything), strict=True))
    # Calls follow each other: before the first layer comes the last one.
    assert before == {"a": "int8", "b": "int8", "y": "float"}


def test_a_table_holds_each_company_and_the_mean_over_all() -> None:
    shown = Observation("Add", "float", "1>1", ("Add",), 0, 8, 0.0)
    found = [replace(shown, seconds=1e-6, neighbour="int8"), replace(shown, seconds=3e-6, neighbour="float")]
    times = tables(found, machine="m", versions={}, date="2026-01-01", threads=1, call_s=0.0).times
    assert times == {"Add": {"float": {"1>1": 2e-6, "1>1 beside int8": 1e-6, "1>1 beside float": 3e-6}}}


def test_conversions_are_looked_up_by_shape(plain: Profile) -> None:
    shape = (1, 8, 16, 16)
    changes = {"per_op_s": 1e-6, "onnxruntime_per_op_s": 4e-6}
    model = plain.model_copy(update={"overheads": plain.overheads.model_copy(update=changes)})
    for runtime, start in (("artifact", 1e-6), ("onnxruntime", 4e-6)):
        modelled = boundary(shape, model, runtime, "int8", QUANTIZE)  # type: ignore[arg-type]
        assert modelled.seconds == pytest.approx(start + quantize_s(2048, plain))
        assert modelled.source == "modelled"
    times = {QUANTIZE: {"int8": {"1x8x16x16>1x8x16x16": 3e-6}}}
    fits = {DEQUANTIZE: {"int8": {"call_s": 1e-6, "mac_s": 0.0, "byte_s": 1e-10, "points": 5, "error": 0.1}}}
    profile = with_times(plain, times=times, fits=fits)
    assert boundary(shape, profile, RUNTIME, "int8", QUANTIZE) == Estimate(3e-6, "measured")
    near = boundary(shape, profile, RUNTIME, "int8", DEQUANTIZE)
    assert near.source == "fitted" and near.seconds == pytest.approx(1e-6 + 2048 * 5 * 1e-10)


def test_an_estimate_is_as_good_as_its_worse_part() -> None:
    total = Estimate(1.0, "measured") + Estimate(2.0, "fitted")
    assert total == Estimate(3.0, "fitted")
    assert (total + Estimate(1.0, "modelled")).source == "modelled"


def test_fit_recovers_the_coefficients() -> None:
    generator = np.random.default_rng(0)
    macs, moved = 10 ** generator.uniform(4, 8, 40), 10 ** generator.uniform(3, 7, 40)
    seconds = 2e-6 + 3e-11 * macs + 4e-10 * moved
    noisy = seconds * generator.normal(1.0, 0.02, 40)
    fit = fit_work([Point(m, b, s) for m, b, s in zip(macs, moved, noisy, strict=True)])
    assert fit is not None and fit.points == 40
    # Two per cent of noise on forty points: the largest deviation seen over a hundred seeds is 8 %.
    found = (fit.call_s, fit.mac_s, fit.byte_s)
    assert found == pytest.approx((2e-6, 3e-11, 4e-10), rel=0.15)
    assert fit.error < 0.03


def test_fit_has_no_negative_coefficients_and_needs_points() -> None:
    falling = [Point(m, 0.0, 1e-5 / m) for m in (1.0, 10.0, 100.0, 1000.0)]
    fit = fit_work(falling)
    assert fit is not None and min(fit.call_s, fit.mac_s, fit.byte_s) >= 0
    assert fit_work(falling[:3]) is None
    assert fit_work([Point(1, 1, 0.0)] * 9) is None  # fused into a neighbour: nothing to learn from


def test_repeated_calls_are_averaged_so_that_sums_stay() -> None:
    def one(seconds: float) -> Observation:
        return Observation("Add", "float", "4>4", ("Add", "elementwise"), 0, 32, seconds)

    made = tables([one(0.0), one(4e-6)], machine="m", versions={}, date="d", threads=1, call_s=1e-6)
    assert made.times == {"Add": {"float": {"4>4": 2e-6}}}
    made = tables(
        [replace(one(0.0), weight=3.0), one(4e-6)], machine="m", versions={}, date="d", threads=1, call_s=1e-6
    )
    assert made.times == {"Add": {"float": {"4>4": 1e-6}}}
    assert (
        tables([one(1e-6)], machine="m", versions={}, date="d", threads=1, call_s=0, exact=False).times == {}
    )


def test_profile_with_measurements_survives_writing(tmp_path: Path, plain: Profile) -> None:
    profile = with_times(plain, call_s=5e-6, times={"Conv": {"int8": {f"{CONV_RELU} q": 7e-6}}})
    text = dump(profile).replace(
        "provenance:", "provenance:\n  measured: {source: here, confidence: measured}"
    )
    path = tmp_path / "p.yaml"
    path.write_text(text)
    assert load_profile(path).measured == profile.measured


HEAD = "schema: 1\nname: p\nextends: x86-amx\ndescription: d\n"
SOURCE = "provenance: {measured: {source: here, confidence: measured}}\n"
STRICT = {
    "no provenance": (
        "measured: {}\n",
        "the numbers of 'measured' have no provenance",
    ),
    "unknown runtime": (SOURCE + "measured: {onnx: {}}\n", "unknown key 'onnx'"),
    "unknown format": (
        SOURCE + "measured: {onnxruntime: {machine: m, date: '1', times: {Conv: {int7: {'1>1': 1.0}}}}}\n",
        "must be",
    ),
    "negative seconds": (
        SOURCE + "measured: {onnxruntime: {machine: m, date: '1', times: {Conv: {int8: {'1>1': -1.0}}}}}\n",
        "must be at least 0",
    ),
    "no signature": (
        SOURCE + "measured: {onnxruntime: {machine: m, date: '1', times: {Conv: {int8: {some: 1.0}}}}}\n",
        "'some' is not the signature of a call",
    ),
    "energy of no row": (
        "energy: {pj_per_mac: {npu: 1.0}, pj_per_byte: {dram: 1.0}}\n"
        "provenance: {energy: {source: here, confidence: estimate}}\n",
        "unknown compute row 'npu'",
    ),
    "energy without provenance": (
        "energy: {pj_per_mac: {amx_int8: 1.0}, pj_per_byte: {dram: 1.0}}\n",
        "the numbers of 'energy' have no provenance",
    ),
}


@pytest.mark.parametrize("case", list(STRICT))
def test_sections_are_strict(case: str, tmp_path: Path) -> None:
    text, expected = STRICT[case]
    path = tmp_path / "p.yaml"
    path.write_text(HEAD + text)
    findings = check(path)
    assert findings and any(expected in f.what for f in findings)


def test_prediction_adds_operators_conversions_and_the_call(plain: Profile) -> None:
    model = net()
    profile = with_times(
        plain,
        call_s=1e-6,
        times={
            "Conv": {
                "int8": {f"{CONV_RELU} q": 2e-6, "1x8x16x16,c8x8x3x3>1x8x16x16 q": 3e-6},
                "float": {CONV_RELU: 10e-6, "1x8x16x16,c8x8x3x3>1x8x16x16": 20e-6},
            },
            QUANTIZE: {"int8": {"1x8x16x16>1x8x16x16": 4e-6}},
            DEQUANTIZE: {"int8": {"1x8x16x16>1x8x16x16": 5e-6}},
        },
    )
    whole = plan_selection(model, profile, RUNTIME, SHAPES)
    found = predict(whole, profile, RUNTIME, SHAPES)
    # Quantize x, three convolutions, dequantize y.
    assert found.seconds == pytest.approx(1e-6 + 4e-6 + 2e-6 + 3e-6 + 3e-6 + 5e-6)
    assert found.origin == "measured" and found.unknown == ()
    mixed = plan_selection(model, profile, RUNTIME, SHAPES, keep_float=frozenset({"b"}))
    # The middle one in float: its input leaves the integers, its output enters them.
    assert [(c.value.name, c.operator) for c in crossings(mixed)] == [
        ("x", QUANTIZE),
        ("r", DEQUANTIZE),
        ("b", QUANTIZE),
        ("y", DEQUANTIZE),
    ]
    assert predict(mixed, profile, RUNTIME, SHAPES).seconds == pytest.approx(
        1e-6 + 2 * 4e-6 + 2e-6 + 20e-6 + 3e-6 + 2 * 5e-6
    )
    assert predict_float(whole, profile, RUNTIME, SHAPES).seconds == pytest.approx(1e-6 + 10e-6 + 40e-6)


def test_prediction_names_operators_of_unknown_shape(plain: Profile) -> None:
    model = net()
    selection = plan_selection(model, plain, RUNTIME, SHAPES)
    node = model.graph.node(2)
    node.outputs[0].shape = ir.Shape(["n", 8, 16, 16])
    known = {k: v for k, v in SHAPES.items() if k != "b"}
    assert "b" in predict(selection, plain, RUNTIME, known).unknown


def test_energy_is_macs_and_bytes_at_their_prices(plain: Profile) -> None:
    conv = net().graph.node(0)
    with pytest.raises(ProfileError, match="the profile says nothing about energy"):
        energy_j(conv, {}, plain, RUNTIME, "int8")
    levels = {level.name: 2.0 for level in plain.memory}
    rows = {row.name: 3.0 for row in plain.compute}
    profile = plain.model_copy(update={"energy": Energy(pj_per_mac=rows, pj_per_byte=levels)})
    macs = 8 * 16 * 16 * 72
    expected = (macs * 3 + call_traffic(conv, {}, profile, RUNTIME, "int8") * 2) * 1e-12
    assert energy_j(conv, {}, profile, RUNTIME, "int8") == pytest.approx(expected)
    selection = plan_selection(net(), profile, RUNTIME, SHAPES)
    idle = profile.model_copy(update={"energy": Energy(pj_per_mac=rows, pj_per_byte=levels, static_w=2.0)})
    spent = [placement_energy_j(selection, p, RUNTIME, SHAPES) for p in (profile, idle)]
    seconds = predict(selection, profile, RUNTIME, SHAPES).seconds
    assert spent[1] - spent[0] == pytest.approx(2.0 * seconds)
    lacking = plain.model_copy(update={"energy": Energy(pj_per_mac={"avx512_fma": 1.0}, pj_per_byte=levels)})
    with pytest.raises(ProfileError, match="no price for"):
        energy_j(conv, {}, lacking, RUNTIME, "int8")


def test_peak_memory_counts_what_is_alive(plain: Profile) -> None:
    model, tensor = net(), 8 * 16 * 16
    nothing = plan_selection(model, plain, RUNTIME, SHAPES, keep_float=frozenset("aby"))
    real = peak_activation_bytes(nothing, plain, RUNTIME, SHAPES)
    # Every step reads one tensor and writes one.
    assert real.bytes == 2 * 4 * tensor and len(real.tensors) == 2
    whole = peak_activation_bytes(plan_selection(model, plain, RUNTIME, SHAPES), plain, RUNTIME, SHAPES)
    # The input in float and as integers, and the first result as integers.
    assert whole.bytes == (4 + 1 + 1) * tensor and whole.step == "a"


def test_blocks_are_valid_models_with_constant_weights() -> None:
    for block in blocks():
        model = block.model()
        assert [v.name for v in model.graph.inputs] == ["x"]
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
