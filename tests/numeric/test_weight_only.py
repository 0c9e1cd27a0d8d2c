"""Weight-only formats from profile to ONNX Runtime: every product against a numpy reference, shared weights, tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_harness import run_onnxruntime
from weight_only_cases import (
    FLOAT32,
    GEMM,
    INTEGER_FORMATS,
    MATMUL,
    PROFILE,
    TABLE,
    TWO_READERS,
    activation_bound,
    array_of,
    build,
    dequantized,
    inputs,
    kernels,
    plan_of,
    quantized,
    stored,
)

from bitwright.compiler.graph.saving import weight_bytes
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.plan.planner import plan_selection
from bitwright.compiler.plan.units import FormatChoice
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import Dot
from bitwright.passes import round_nearest
from bitwright.passes.raise_opset import RaiseOpset
from bitwright.passes.round_nearest import RoundNearest, round_to_nearest

# -------------------------------------------------------------------------------------------------------- the products


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("depth", "columns"), [(64, 48), (70, 47), (33, 5), (16, 1)])
@pytest.mark.parametrize("text", [MATMUL, GEMM], ids=["matmul", "gemm"])
@pytest.mark.parametrize("fmt", INTEGER_FORMATS)
def test_integer_formats(fmt: str, text: str, depth: int, columns: int, everywhere: bool) -> None:
    model = build(text, depth, columns)
    plan = plan_of(model, fmt)
    weight = dequantized(array_of(model, "w"), plan.weights["w"])
    x = inputs(depth)
    expected = x.astype(np.float64) @ weight + array_of(model, "b")
    scale = np.abs(expected).max()

    exact = quantized(model, plan, everywhere=everywhere, level=0)
    np.testing.assert_allclose(run_onnxruntime(exact, {"x": x})["y"], expected, atol=FLOAT32 * scale)

    fast = quantized(model, plan, everywhere=everywhere)
    assert kernels(fast) == ["MatMulNBits"]
    got = run(open_session(fast), {"x": x})["y"]
    bound = activation_bound(x, weight, plan.weights["w"].group) + FLOAT32 * scale
    assert (np.abs(got - expected) <= bound).all()


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_groups_of_every_length(group: int) -> None:
    model = build(MATMUL, 300, 24)
    plan = plan_of(model, "w4", group=group)
    assert plan.weights["w"].group == group
    weight = dequantized(array_of(model, "w"), plan.weights["w"])
    x = inputs(300)
    expected = x.astype(np.float64) @ weight + array_of(model, "b")
    result = quantized(model, plan)
    assert kernels(result) == ["MatMulNBits"]
    got = run(open_session(result), {"x": x})["y"]
    bound = activation_bound(x, weight, group) + FLOAT32 * np.abs(expected).max()
    assert (np.abs(got - expected) <= bound).all()


@pytest.mark.parametrize("text", [MATMUL, GEMM], ids=["matmul", "gemm"])
@pytest.mark.parametrize(("depth", "columns", "group"), [(64, 48, 64), (96, 47, 32), (16, 5, 16)])
def test_nf4(text: str, depth: int, columns: int, group: int) -> None:
    model = build(text, depth, columns)
    plan = plan_of(model, "nf4")
    assert plan.weights["w"].group == group, "the longest-ranked group that divides the reduction"
    x = inputs(depth)
    weight = dequantized(array_of(model, "w"), plan.weights["w"])
    expected = x.astype(np.float64) @ weight + array_of(model, "b")
    result = quantized(model, plan)
    assert kernels(result)[0] == "MatMulBnb4"
    atol = FLOAT32 * np.abs(expected).max()
    np.testing.assert_allclose(run(open_session(result), {"x": x})["y"], expected, atol=atol)
    standard = model.clone()
    RaiseOpset(21).run(standard)
    RoundNearest(plan).run(standard)
    onnx.checker.check_model(ir.to_proto(standard), full_check=True)
    np.testing.assert_allclose(run_onnxruntime(standard, {"x": x})["y"], expected, atol=atol)


def test_nf4_needs_groups_that_end_with_the_columns() -> None:
    decision = plan_of(build(MATMUL, 70, 47), "nf4").nodes["product"]
    assert decision.format == "float"
    assert decision.reason == "groups of 16, 32, 64, 128, 256 do not divide its 70 inputs (product)"


def test_half_precision_weights() -> None:
    model = build(MATMUL)
    plan = plan_of(model, "fp16-weights")
    result = quantized(model, plan)
    assert result.opset_imports[""] == 20, "nothing here needs a newer opset"
    assert stored(result, "_half").dtype == np.float16
    assert weight_bytes(result) == 70 * 47 * 2 + 47 * 4
    x = inputs(70)
    weight = array_of(model, "w").astype(np.float16).astype(np.float64)
    expected = x.astype(np.float64) @ weight + array_of(model, "b")
    got = run(open_session(result), {"x": x})["y"]
    np.testing.assert_allclose(got, expected, atol=FLOAT32 * np.abs(expected).max())


def test_a_weight_beyond_half_precision_stays_float() -> None:
    weight = np.ones((70, 47))
    weight[3, 4] = 70000.0
    decision = plan_of(build(MATMUL, w=weight), "fp16-weights").nodes["product"]
    assert (decision.format, decision.weight) == ("float", "")
    assert "65504" in decision.reason


def test_the_next_format_is_taken_where_the_first_does_not_fit() -> None:
    model = build(MATMUL, 70, 47)
    choice = FormatChoice(("nf4", "w4"), (), ("int8",))
    units = plan_selection(model, PROFILE, "onnxruntime", {}, formats=choice).units
    assert [u.combo.format for u in units if u.combo is not None] == ["w4"]


# ----------------------------------------------------------------------------------------------------- several readers


@pytest.mark.parametrize("fmt", ["w8", "w4", "w2", "nf4", "fp16-weights"])
def test_a_shared_weight_is_stored_once_and_every_reader_has_its_kernel(fmt: str) -> None:
    model = build(TWO_READERS, 64, 48)
    plan = plan_of(model, fmt)
    result = quantized(model, plan)
    widths = {"w8": 8, "w4": 4, "w2": 2, "nf4": 4, "fp16-weights": 16}
    assert weight_bytes(result) < 64 * 48 * widths[fmt] / 8 + 64 * 48 / 16 * 5 + 48 * 4
    # ONNX Runtime sees that three float products are one.
    kernel, count = {"nf4": ("MatMulBnb4", 3), "fp16-weights": ("MatMul", 1)}.get(fmt, ("MatMulNBits", 3))
    assert kernels(result).count(kernel) == count
    got = run(open_session(result), {"x": inputs(64)})["y"]
    single = build(MATMUL, 64, 48)
    alone = quantized(single, plan_of(single, fmt))
    # Equal products cancel, so the rest is what one reader alone computes; its kernel may add in another order.
    expected = run(open_session(alone), {"x": inputs(64)})["y"]
    np.testing.assert_allclose(got, expected, atol=2 * FLOAT32 * np.abs(expected).max())


@pytest.mark.parametrize("through_transpose", [True, False])
def test_a_tied_table_is_stored_once(through_transpose: bool) -> None:
    array = np.random.default_rng(0).normal(size=(800, 96))
    text = TABLE if through_transpose else TABLE.replace("  [turn] t = Transpose<perm = [1, 0]>(w)\n", "")
    model = build(text, w=array, **({} if through_transpose else {"t": array.T}))
    plan = plan_of(model, "w4", tables=("w4",))
    result = quantized(model, plan)
    assert weight_bytes(result) == 800 * 96 // 2 + 800 * 3 * 4 + 800 * 3 // 2
    assert kernels(result) == ["GatherBlockQuantized", "MatMulNBits"]
    table = dequantized(array_of(model, "w"), plan.weights["w (table)"])
    rows = np.array([[0, 799, 5]])
    looked_up = table[rows[0]]
    expected = looked_up @ table.T
    bound = activation_bound(looked_up, table.T, 32) + FLOAT32 * np.abs(expected).max()
    got = run(open_session(result), {"i": rows})["y"][0]
    assert (np.abs(got - expected) <= bound).all()


def test_a_table_in_four_bits_beside_a_head_in_eight() -> None:
    model = build(TABLE, w=np.random.default_rng(0).normal(size=(800, 96)))
    plan = plan_of(model, "w8", tables=("w4",))
    result = quantized(model, plan)
    table = dequantized(array_of(model, "w"), plan.weights["w (table)"])
    head = dequantized(array_of(model, "w").T, plan.weights["w (transposed)"])
    rows = np.array([[0, 799, 5]])
    expected = table[rows[0]] @ head
    bound = activation_bound(table[rows[0]], head, 32) + FLOAT32 * np.abs(expected).max()
    assert (np.abs(run(open_session(result), {"i": rows})["y"][0] - expected) <= bound).all()


# ------------------------------------------------------------------------------------------------------- other kernels


def test_weight_only_and_integer_products_in_one_model() -> None:
    text = """<ir_version: 9, opset_import: ["": 20]>
g (float[m, {K}] x) => (float[m, {K}] y) {{
  [first] t = MatMul(x, w)
  [relu] r = Tanh(t)
  [second] y = MatMul(r, v)
}}"""
    random = np.random.default_rng(0)
    model = build(text, 64, 48, v=random.normal(size=(48, 64)))
    ranges = {"x": (-4.0, 4.0), "r": (-1.0, 1.0)}
    plan = plan_of(model, "int8", nodes={"first": "w4"}, ranges=ranges)
    assert {n: d.format for n, d in plan.nodes.items()} == {"first": "w4", "relu": "float", "second": "int8"}
    found = kernels(quantized(model, plan))
    assert "MatMulNBits" in found and "MatMulIntegerToFloat" in found and "MatMul" not in found


@pytest.mark.parametrize("text", [MATMUL, GEMM], ids=["matmul", "gemm"])
def test_four_bits_on_the_eight_bit_kernel(text: str) -> None:
    model = build(text, 64, 48)
    plan = plan_of(model, "w4a8", ranges={"x": (-4.0, 4.0), "y": (-40.0, 40.0)})
    quant = plan.weights["w"]
    assert (quant.dtype, quant.bits) == ("int8", 4)
    result = quantized(model, plan)
    integers = stored(result, "w_quantized")
    assert integers.dtype == np.int8
    np.testing.assert_array_equal(np.abs(integers).max(axis=0), np.full(48, 7))
    assert not {"MatMul", "Gemm", "FusedMatMul"} & set(kernels(result))


@pytest.mark.parametrize(("axis", "group"), [(0, 16), (1, 16), (0, 0), (1, 0), (None, 0)])
def test_large_weights_are_rounded_in_parts(
    axis: int | None, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    weight = random.normal(size=(70, 40)).astype(np.float32)
    shape = [-(-n // group) if group and k == axis else n for k, n in enumerate(weight.shape)]
    shape = shape if group else [1] if axis is None else [weight.shape[axis]]
    scale = random.uniform(0.05, 0.2, shape).astype(np.float32)
    zero = random.integers(0, 16, shape)
    quant = WeightQuant("w", "uint4", axis, scale, zero, group, 4)
    whole = round_to_nearest(weight, quant)
    monkeypatch.setattr(round_nearest, "BLOCK", 120)
    np.testing.assert_array_equal(round_to_nearest(weight, quant), whole)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_artifact_reads_four_bits_from_either_container(dtype: str) -> None:
    model = build(MATMUL, 64, 48)
    model.graph.inputs[0].shape = ir.Shape([3, 64])
    model.graph.outputs[0].shape = ir.Shape([3, 48])
    plan = plan_of(model, "w4a8", ranges={"x": (-4.0, 4.0)})
    plan.weights["w"] = replace(plan.weights["w"], dtype=dtype)
    result = quantized(model, plan)
    assert stored(result, "w_quantized").dtype.name == dtype
    (step,) = (s for s in extract_program(result).steps if isinstance(s, Dot))
    scale = plan.weights["w"].scale
    np.testing.assert_array_equal(step.weight, np.clip(np.rint(array_of(model, "w") / scale), -7, 7))
    np.testing.assert_array_equal(step.weight.dtype, np.int8)


def test_a_table_in_half_precision() -> None:
    model = build(TABLE, w=np.random.default_rng(0).normal(size=(800, 96)))
    result = quantized(model, plan_of(model, "fp16-weights", tables=("fp16-weights",)))
    rows = np.array([[0, 799, 5]])
    table = array_of(model, "w").astype(np.float16).astype(np.float64)
    expected = table[rows[0]] @ table.T
    got = run(open_session(result), {"i": rows})["y"][0]
    np.testing.assert_allclose(got, expected, atol=FLOAT32 * np.abs(expected).max())


@pytest.mark.parametrize("fmt", ["w4", "w2", "nf4"])
@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 1, 3, 64)], ids=["vector", "no rows", "rank 4"])
def test_activations_of_any_rank(shape: tuple[int, ...], fmt: str) -> None:
    dims = ", ".join(str(d) if d else "m" for d in shape)
    text = f"""<ir_version: 9, opset_import: ["": 20]>
g (float[{dims}] x) => (float[{dims.removesuffix("64")}48] y) {{{{
  [product] y = MatMul(x, w)
}}}}"""
    model = build(text, 64, 48)
    plan = plan_of(model, fmt)
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    weight = dequantized(array_of(model, "w"), plan.weights["w"])
    got = run(open_session(quantized(model, plan)), {"x": x})["y"]
    rows = x.reshape(-1, 64)
    expected = rows.astype(np.float64) @ weight
    assert got.shape == (*shape[:-1], 48)
    bound = activation_bound(rows, weight, plan.weights["w"].group) + FLOAT32 * np.abs(expected).max(
        initial=1
    )
    assert (np.abs(got.reshape(-1, 48) - expected) <= bound).all()
