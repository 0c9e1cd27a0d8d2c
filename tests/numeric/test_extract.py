"""Each Q/DQ pattern becomes the expected steps, and the program computes what ONNX Runtime computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from qdq_cases import CASES
from qdq_models import (
    BIAS,
    PARAMS,
    Case,
    build,
    extract,
    feeds,
    kinds,
    ort_run,
    out,
    qdq,
    scales,
    weight,
)

from bitwright.compiler.errors import ModelError
from bitwright.compiler.interpret.island import OrtRunner
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import Dot


def check(actual: np.ndarray, expected: np.ndarray, quantum: float | None) -> int:
    """Compare within one quantum (float results: float32 summation order) and return how many differ."""
    if quantum is None:
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)
        return 0
    steps = np.rint((actual.astype(np.float64) - expected) / quantum)
    # The program scales the accumulator once; ONNX Runtime adds float products and divides. Results that lie
    # on a rounding boundary may fall to either side: one step, for few elements.
    assert np.abs(steps).max() <= 1
    assert np.count_nonzero(steps) <= max(1, actual.size // 100)
    return int(np.count_nonzero(steps))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_pattern(case: Case) -> None:
    model = build(case)
    program = extract(model)
    assert kinds(program) == case.kinds, program.notes
    quantum = None if case.quantum is None else float(PARAMS[case.quantum][0])
    runner = OrtRunner()
    for _ in range(4):
        data = feeds(model)
        actual = run_program(program, data, float_runner=runner)
        check(actual["y"], ort_run(model, data, optimised=False)["y"], quantum)
        if case.optimises:
            different = check(actual["y"], ort_run(model, data, optimised=True)["y"], quantum)
            assert different == 0 or not case.exact


@pytest.mark.parametrize("opset", [13, 17, 21, 23])
@pytest.mark.parametrize("name", ["conv bias relu", "matmul add relu to int", "residual add relu"])
def test_every_opset_reads_the_same(name: str, opset: int) -> None:
    case = next(c for c in CASES if c.name == name)
    model = build(replace(case, opset=opset))
    assert kinds(extract(model)) == case.kinds


def test_island_with_external_weights_runs(tmp_path: Path) -> None:
    text = '<ir_version: 9, opset_import: ["": 17]> g (float[2,8] x) => (float[2,5] y) { y = MatMul(x, w) }'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 5), np.float32), "w"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    program = extract_program(ir.load(tmp_path / "m.onnx"))
    assert run_program(program, {"x": np.ones((2, 8), np.float32)})["y"].tolist() == [[8.0] * 5] * 2


MODES = ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners", "asymmetric")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("target", [[1, 2, 8, 10], [1, 2, 3, 2], [1, 2, 1, 13], "2.0,1.7"])
def test_resize_indices_equal_onnxruntime(mode: str, rounding: str, target: list[int] | str) -> None:
    """Only moved integers: every element must be equal."""
    sized = not isinstance(target, str)
    factors = np.array([1, 1, 2, 1.7], np.float32)
    shape = target if sized else [1, 2, 8, int(5 * factors[3])]
    how = "none, sizes" if sized else "factors"
    body = (
        qdq("x", "a")
        + f'r = Resize<mode="nearest", coordinate_transformation_mode="{mode}", nearest_mode="{rounding}">'
        + f"(x_d, none, {how})\n"
        + out("r", "a")
    )
    body = body.replace("none", "")
    arrays = {"factors": factors, "sizes": np.array(shape, np.int64)}
    case = Case("resize", body, "[1,2,4,5]", str(shape), "", "a", arrays)
    model = build(case)
    program = extract(model)
    assert kinds(program) == "Quantize Move:resize_nearest Dequantize"
    data = feeds(model)
    np.testing.assert_array_equal(run_program(program, data)["y"], ort_run(model, data, optimised=False)["y"])


def test_integer_tensors_keep_the_quantizer_names() -> None:
    case = next(c for c in CASES if c.name == "movers")
    program = extract(build(case))
    assert {"x_q", "r_q"} <= program.tensors.keys()
    assert [s.outputs for s in program.steps][-2:] == [("r_q",), ("y",)]


def test_fused_clip_becomes_integer_bounds() -> None:
    case = next(c for c in CASES if c.name == "depthwise clip")
    (conv,) = (s for s in extract(build(case)).steps if isinstance(s, Dot))
    assert (conv.lower, conv.upper) == (100 - 6, 100 + 10)


def test_accumulator_that_could_overflow_stays_float() -> None:
    """Bias near the int32 limit: 8 * 127 * 135 more does not fit."""
    sw = scales(5)
    arrays = {"W": np.full((8, 5), 127, np.int8), "sW": sw, "sB": PARAMS["a"][0] * sw}
    arrays["B"] = np.full(5, 2**31 - 1000, np.int32)
    body = qdq("x", "a") + weight(1) + BIAS + "g = Gemm(x_d, w, bias)\n" + out("g", "c")
    program = extract(build(Case("overflow", body, "[4,8]", "[4,5]", "", "c", arrays)))
    assert kinds(program) == "Quantize Dequantize FloatIsland Quantize Dequantize"
    assert any("overflow" in note for note in program.notes)


def test_island_shares_weights_and_is_valid() -> None:
    text = """<ir_version: 9, opset_import: ["": 17]> g (float[2,8] x) => (float[2,5] y, float[2,5] z)
    { m = MatMul(x, big) t = Tanh(m) y = Softmax(t) z = Identity(m) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 5), np.float32), "big"))
    model = ir.from_proto(proto)
    program = extract_program(model)
    (island,) = program.steps
    assert island.inputs == ("x",)
    assert island.outputs == ("y", "z")
    big = island.model.graph.initializers["big"].const_value  # type: ignore[attr-defined]
    assert big is model.graph.initializers["big"].const_value
    onnx.checker.check_model(ir.to_proto(island.model), full_check=True)  # type: ignore[attr-defined]


def test_inputs_and_constants_as_outputs() -> None:
    text = """<ir_version: 9, opset_import: ["": 17]> g (float[2] x) => (float[2] x, float[3] k, uint8[2] q)
    <float[3] k = {1.0, 2.0, 3.0}, float s = {0.5}, uint8 z = {3}> { q = QuantizeLinear(x, s, z) }"""
    program = extract_program(ir.from_proto(onnx.parser.parse_model(text)))
    found = run_program(program, {"x": np.array([1, -1], np.float32)})
    assert found["k"].tolist() == [1, 2, 3]
    assert found["x"].tolist() == [1, -1]
    assert found["q"].tolist() == [5, 1]


def test_equal_quantizer_that_is_an_output_is_written() -> None:
    text = """<ir_version: 9, opset_import: ["": 17]> g (float[4] x) => (uint8[4] a, uint8[4] b)
    <float s = {0.5}, uint8 z = {3}>
    { a = QuantizeLinear(x, s, z) d = DequantizeLinear(a, s, z) b = QuantizeLinear(d, s, z) }"""
    program = extract_program(ir.from_proto(onnx.parser.parse_model(text)))
    found = run_program(program, {"x": np.array([1, -1, 0.26, 500], np.float32)})
    assert found["a"].tolist() == found["b"].tolist() == [5, 1, 4, 255]


def test_unfixed_input_shape_is_refused() -> None:
    text = '<ir_version: 9, opset_import: ["": 17]> g (float[n] x) => (float[n] y) { y = Tanh(x) }'
    with pytest.raises(ModelError, match="input 'x'"):
        extract_program(ir.from_proto(onnx.parser.parse_model(text)))
