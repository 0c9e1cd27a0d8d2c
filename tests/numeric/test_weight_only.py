"""Weight-only formats from profile to file: what is stored, and what ONNX Runtime makes of it.

The reference is numpy: the plan's scales and zero points, rounding written out again, one float64 product.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pass_harness import run_onnxruntime

from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.model import FreshNames, constant_array
from bitwright.compiler.graph.saving import weight_bytes
from bitwright.compiler.ort.audit import optimized_graph
from bitwright.compiler.ort.session import config_for, open_session, run
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.plan.planner import make_plan, plan_selection
from bitwright.compiler.plan.quantizers import grouped_scale
from bitwright.compiler.plan.units import FormatChoice
from bitwright.passes import round_nearest
from bitwright.passes.block_tables import BlockTables
from bitwright.passes.insert_qdq import InsertQDQ
from bitwright.passes.pack_bnb4 import PackBnb4
from bitwright.passes.pack_nbits import PackNBits, pack
from bitwright.passes.quantize_tables import QuantizeTables
from bitwright.passes.raise_opset import RaiseOpset
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_nearest import RoundNearest, round_to_nearest
from bitwright.passes.stored_weights import needed_opset, store_weight
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import QSpace

PROFILE = load_profile("x86-avx512-vnni")
GOLDEN = Path(__file__).parents[1] / "golden"
# ONNX Runtime sums float32 products in blocks; the reference in float64.
FLOAT32 = 2e-6
INTEGER_FORMATS = ["w8", "w4", "w2", "ternary", "binary"]
MATMUL = """<ir_version: 9, opset_import: ["": 20]>
g (float[m, {K}] x) => (float[m, {N}] y) {{
  [product] t = MatMul(x, w)
  [bias] y = Add(t, b)
}}"""
GEMM = """<ir_version: 9, opset_import: ["": 20]>
g (float[m, {K}] x) => (float[m, {N}] y) {{
  [product] y = Gemm(x, w, b)
}}"""
TWO_READERS = """<ir_version: 9, opset_import: ["": 20]>
g (float[m, {K}] x) => (float[m, {N}] y) {{
  [first] t = MatMul(x, w)
  [second] u = MatMul(x, w)
  [sum] v = Sub(t, u)
  [product] z = MatMul(x, w)
  [bias] s = Add(z, b)
  [result] y = Add(s, v)
}}"""
TABLE = """<ir_version: 9, opset_import: ["": 20]>
g (int64[1, m] i) => (float[1, m, 800] y) {{
  [rows] e = Gather(w, i)
  [turn] t = Transpose<perm = [1, 0]>(w)
  [head] y = MatMul(e, t)
}}"""


def build(text: str, depth: int = 70, columns: int = 47, **given: np.ndarray) -> ir.Model:
    """Return the model with the arrays given, others random normal."""
    random = np.random.default_rng(0)
    arrays = {"w": random.normal(size=(depth, columns)), "b": random.normal(size=columns), **given}
    proto = onnx.parser.parse_model(text.format(K=depth, N=columns))
    used = {name for node in proto.graph.node for name in node.input}
    for name, array in arrays.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def plan_of(
    model: ir.Model,
    fmt: str,
    *,
    group: int | None = None,
    tables: tuple[str, ...] = ("int8",),
    nodes: Mapping[str, str] | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> Plan:
    choice = FormatChoice((fmt,), (), tables, nodes or {})
    selection = plan_selection(model, PROFILE, "onnxruntime", {}, formats=choice)
    return make_plan(selection, ranges or {}, PROFILE, "onnxruntime", {}, method="minmax", group=group)


def quantized(model: ir.Model, plan: Plan, *, everywhere: bool = False, level: int = 4) -> ir.Model:
    """Run the passes of the deployment and check what they wrote."""
    result = model.clone()
    RaiseOpset(needed_opset(plan.weights.values())).run(result)
    for step in (
        BlockTables(plan),
        QuantizeTables(plan),
        RoundNearest(plan),
        InsertQDQ(plan),
        PackBnb4(),
        PackNBits(everywhere, level),
        RemoveUnused(),
    ):
        step.run(result)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    for step in (BlockTables(plan), PackBnb4(), PackNBits(everywhere, level)):
        assert step.run(result).changed == 0, "run on its own output a pass changes nothing"
    return result


NF4_UPPER = [0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1]
NF4_LOWER = [-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500]
NF4 = np.array([*NF4_LOWER, *NF4_UPPER])


def dequantized(weight: np.ndarray, quant: WeightQuant) -> np.ndarray:
    """Return what a weight becomes, group by group and in float64; independent of the passes' code."""
    result = np.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            at = [row, column]
            at[quant.axis or 0] //= quant.group
            scale = float(quant.scale[tuple(at)])
            step = float(np.float32(weight[row, column]) / np.float32(scale))
            if quant.codebook == "nf4":
                level = NF4[np.abs(NF4 - step).argmin()]
            elif quant.codebook == "ternary":
                level = float(np.clip(np.rint(step), -1, 1))
            elif quant.codebook == "binary":
                level = 1.0 if step >= 0 else -1.0
            else:
                zero = 0 if quant.zero_point is None else int(quant.zero_point[tuple(at)])
                low = 0 if quant.dtype.startswith("uint") else -(2 ** (quant.bits - 1))
                level = float(np.clip(np.rint(step) + zero, low, low + 2**quant.bits - 1) - zero)
            result[row, column] = level * scale
    return result


def activation_bound(x: np.ndarray, weight: np.ndarray, block: int) -> np.ndarray:
    """Return how far an output may be off if activations are rounded to 8 bits in blocks.

    The block's largest magnitude is 127 steps, and rounding is off by half a step at most.
    """
    bound = np.zeros((x.shape[0], weight.shape[1]))
    for start in range(0, x.shape[1], block):
        step = np.abs(x[:, start : start + block]).max(axis=1) / 127
        bound += step[:, None] / 2 * np.abs(weight[start : start + block]).sum(axis=0)
    return bound


def array_of(model: ir.Model, name: str) -> np.ndarray:
    array = constant_array(model.graph.initializers[name])
    assert array is not None
    return array


def stored(model: ir.Model, ending: str) -> np.ndarray:
    """Return the one initializer whose name has this ending."""
    names = [n for n in model.graph.initializers if n.endswith(ending)]
    assert len(names) == 1, names
    return array_of(model, names[0])


def inputs(depth: int, rows: int = 5) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(rows, depth)).astype(np.float32)


def kernels(model: ir.Model) -> list[str]:
    return [n.op_type for n in optimized_graph(model, config_for(PROFILE.runtimes.onnxruntime)).graph]


# ------------------------------------------------------------------------------------------------ the products


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


# ------------------------------------------------------------------------------------------ what is in the file


def test_four_bits_are_stored_as_planned() -> None:
    column = np.float32([-1.0, 0.5, 2.0, 0.0] * 4 + [0.0, 3.0] * 8)
    model = build(MATMUL, 32, 1, w=column[:, None], b=np.zeros(1))
    plan = plan_of(model, "w4", group=16)
    quant = plan.weights["w"]
    np.testing.assert_array_equal(quant.scale, np.float32([[3.0 / 15], [3.0 / 15]]))
    assert quant.zero_point is not None
    np.testing.assert_array_equal(quant.zero_point, [[5], [0]])
    result = quantized(model, plan)
    assert [v.dtype.name for v in result.graph.initializers.values() if v.dtype].count("UINT4") == 2
    integers = stored(result, "_quantized").astype(int)[:, 0]
    # 0.5 / 0.2 = 2.5 rounds to the even 2
    np.testing.assert_array_equal(integers, [0, 7, 15, 5] * 4 + [0, 15] * 8)
    packed = stored(quantized(model, plan, everywhere=True), "_packed")
    assert packed.shape == (1, 2, 8)
    assert packed.tobytes() == bytes([0x70, 0x5F] * 4 + [0xF0] * 8), "the first value in the lower half"


def test_packing_order() -> None:
    assert pack(np.array([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(np.array([0, 1, 2, 3, 3]), 2).tolist() == [0b11100100, 0b11]
    assert pack(np.array([[7], [255]]), 8).tolist() == [[7], [255]]


def test_nf4_is_stored_column_by_column_with_the_first_value_in_the_upper_half() -> None:
    weight = np.zeros((16, 2))
    weight[:, 0] = 2.0 * NF4[::-1]
    weight[:, 1] = NF4
    model = build(MATMUL, 16, 2, w=weight, b=np.zeros(2))
    result = quantized(model, plan_of(model, "nf4"))
    expected = [
        0xFE,
        0xDC,
        0xBA,
        0x98,
        0x76,
        0x54,
        0x32,
        0x10,
        0x01,
        0x23,
        0x45,
        0x67,
        0x89,
        0xAB,
        0xCD,
        0xEF,
    ]
    assert stored(result, "_packed").tolist() == expected
    np.testing.assert_array_equal(stored(result, "_absmax"), np.float32([2, 1]))


@pytest.mark.parametrize(
    ("fmt", "bits_each"), [("w8", 8), ("w4", 4), ("w2", 2), ("ternary", 2), ("binary", 2)]
)
def test_the_file_holds_the_bits_and_little_more(fmt: str, bits_each: int) -> None:
    model = build(MATMUL, 256, 128)
    plan = plan_of(model, fmt, group=128)
    scales = 2 * 128 * 4
    zeros = 2 * 128 * bits_each // 8 if plan.weights["w"].zero_point is not None else 0
    bias = 128 * 4
    assert weight_bytes(quantized(model, plan)) == 256 * 128 * bits_each // 8 + scales + zeros + bias


@pytest.mark.parametrize(
    ("fmt", "name"), [("w4", "weight_only_w4"), ("nf4", "weight_only_nf4"), ("w2", "weight_only_w2")]
)
def test_golden_text(fmt: str, name: str) -> None:
    model = build(MATMUL, 64, 3 if fmt == "w2" else 4)
    text = onnx.printer.to_text(_without_data(quantized(model, plan_of(model, fmt))))
    assert text.splitlines() == (GOLDEN / f"weight_only_{fmt}.txt").read_text().splitlines()


def _without_data(model: ir.Model) -> onnx.ModelProto:
    proto = ir.to_proto(model)
    proto.ClearField("producer_name")
    del proto.graph.initializer[:], proto.graph.value_info[:]
    return proto


# --------------------------------------------------------------------------------------------- several readers


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


def test_a_tied_table_is_stored_once() -> None:
    model = build(TABLE, w=np.random.default_rng(0).normal(size=(800, 96)))
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


# ------------------------------------------------------------------------------------------------- other kernels


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


# ------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize(
    ("dequantize", "product"),
    [
        ("DequantizeLinear <axis = 0, block_size = 24> (q, s)", "MatMul(x, w)"),
        ("DequantizeLinear <axis = 0, block_size = 8> (q, s)", "MatMul(x, w)"),
        ("DequantizeLinear <axis = 1, block_size = 16> (q, s)", "MatMul(x, w)"),
        ("DequantizeLinear <axis = 1> (q, s)", "MatMul(x, w)"),
        ("DequantizeLinear <axis = 0, block_size = 16> (q, s)", "Gemm <transB = 1> (x, w)"),
        ("DequantizeLinear <axis = 0, block_size = 16> (q, s)", "Gemm <alpha = 2.0> (x, w)"),
        ("DequantizeLinear <axis = 0, block_size = 16> (q, s)", "MatMul(w, x)"),
    ],
)
def test_other_forms_are_not_packed(dequantize: str, product: str) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 21]>
g (float[48, 48] x) => (float[48, 48] y) {{
  w = {dequantize}
  y = {product}
}}"""
    proto = onnx.parser.parse_model(text)
    block = 24 if "24" in dequantize else 8 if "= 8" in dequantize else 16
    shape = (48,) if "block" not in dequantize else (48, 3) if "axis = 1" in dequantize else (48 // block, 48)
    random = np.random.default_rng(0)
    for name, array in {
        "q": random.integers(-8, 8, (48, 48)).astype(np.int8),
        "s": np.ones(shape, np.float32),
    }.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert PackNBits(everywhere=True).run(model).changed == 0


def test_a_foreign_model_without_zero_points_is_packed_by_the_rules_of_its_types() -> None:
    """DequantizeLinear takes 0 where there is no zero point, MatMulNBits the middle of the type."""
    for dtype, low, high in (("uint8", 0, 255), ("int8", -128, 127)):
        text = """<ir_version: 10, opset_import: ["": 21]>
g (float[m, 40] x) => (float[m, 6] y) {
  w = DequantizeLinear <axis = 0, block_size = 16> (q, s)
  y = MatMul(x, w)
}"""
        proto = onnx.parser.parse_model(text)
        random = np.random.default_rng(0)
        integers = random.integers(low, high + 1, (40, 6)).astype(dtype)
        scale = random.uniform(0.5, 1.5, (3, 6)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(integers, "q"))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(scale, "s"))
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        x = inputs(40)
        expected = run_onnxruntime(model, {"x": x})["y"]
        assert PackNBits(everywhere=True, accuracy_level=0).run(model).changed == 1
        np.testing.assert_allclose(
            run_onnxruntime(model, {"x": x})["y"], expected, atol=FLOAT32 * np.abs(expected).max()
        )


# --------------------------------------------------------------------------------------------- scales and limits


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from([16, 32]), st.booleans(), st.integers(0, 99))
def test_scales_of_few_levels_have_the_least_square_error(
    depth: int, columns: int, group: int, ternary: bool, seed: int
) -> None:
    weight = np.random.default_rng(seed).normal(size=(depth, columns)).astype(np.float32)
    space = QSpace(
        bits=2 if ternary else 1,
        symmetric=True,
        granularity="group",
        groups=(group,),
        codebook="ternary" if ternary else "binary",
    )
    scale, zero_point = grouped_scale(weight, 0, group, space)
    assert zero_point is None and scale.shape == (-(-depth // group), columns)
    for block in range(scale.shape[0]):
        part = weight[block * group : (block + 1) * group].astype(np.float64)
        best = _error(part, scale[block].astype(np.float64), ternary)
        for factor in np.linspace(0.3, 2.0, 35):
            other = _error(part, scale[block] * factor, ternary)
            assert (best <= other * (1 + 1e-5) + 1e-9).all()


def _error(part: np.ndarray, scale: np.ndarray, ternary: bool) -> np.ndarray:
    levels = np.clip(np.rint(part / scale), -1, 1) if ternary else np.where(part >= 0, 1.0, -1.0)
    error: np.ndarray = ((part - levels * scale) ** 2).sum(axis=0)
    return error


@pytest.mark.parametrize("fmt", [*INTEGER_FORMATS, "nf4"])
def test_a_group_of_zeros_adds_nothing(fmt: str) -> None:
    model = build(MATMUL, 64, 4, w=np.zeros((64, 4)), b=np.zeros(4))
    got = run(open_session(quantized(model, plan_of(model, fmt))), {"x": inputs(64)})["y"]
    assert np.abs(got).max() < 2.0**-80


@pytest.mark.parametrize("value", [8, -9])
def test_integers_outside_the_format_are_refused(value: int) -> None:
    model = build(MATMUL, 16, 1)
    quant = WeightQuant("w", "int4", 0, np.ones((1, 1), np.float32), None, 16, 4)
    with pytest.raises(InternalError, match="int4"):
        store_weight(model, "w", np.full((16, 1), value), quant, FreshNames(model))
