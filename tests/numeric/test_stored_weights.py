"""What is written of a quantized weight: integers, packing order, bytes, graph; and what is not packed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pass_harness import run_onnxruntime
from weight_only_cases import (
    FLOAT32,
    GOLDEN,
    INTEGER_FORMATS,
    MATMUL,
    NF4,
    build,
    inputs,
    plan_of,
    quantized,
    stored,
)

from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.graph.saving import weight_bytes
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.plan.quantizers import grouped_scale
from bitwright.passes.pack_nbits import PackNBits, pack
from bitwright.passes.stored_weights import store_weight
from bitwright.targets.schema import QSpace

# ------------------------------------------------------------------------------------------------- what is in the file


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


# -------------------------------------------------------------------------------------------------- what is left alone


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


# --------------------------------------------------------------------------------------------------- scales and limits


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
