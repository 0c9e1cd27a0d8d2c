"""16-bit and 8-bit floating point activations: types, opsets, numerics and what ONNX Runtime executes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_harness import add_weights, count_ops, parse, random, run_onnxruntime

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.plan.model import ActivationQuant, NodeDecision, Plan, WeightQuant
from bitwright.passes.expand_dequantize import ExpandDequantize
from bitwright.passes.insert_qdq import InsertQDQ, activation_opset
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_nearest import RoundNearest
from bitwright.passes.stored_weights import stored_type

LARGEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
LEVELS = {"uint16": (32768, 65535), "int16": (0, 65535)}


def gemm(opset: int = 21) -> ir.Model:
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}]>\n'
        "g (float[4,16] x, float[16,6] w, float[6] c) => (float[4,6] y)\n{ [m] y = Gemm(x, w, c) }"
    )
    return add_weights(parse(text), w=random(16, 6, seed=1), c=random(6, seed=2))


def plan_for(dtype: str, bound: float, weight_dtype: str = "int8") -> Plan:
    weight = random(16, 6, seed=1)
    if dtype in LEVELS:
        zero, steps = LEVELS[dtype]
        scale = float(np.float32(2 * bound / steps))
    else:
        zero, scale = 0, float(np.float32(bound / LARGEST[dtype]))
    codebook = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}.get(weight_dtype, "")
    weight_scale = (np.abs(weight).max(axis=0) / LARGEST.get(weight_dtype, 127.0)).astype(np.float32)
    plan = Plan("test", "onnxruntime")
    plan.activations["x"] = ActivationQuant("x", dtype, scale, zero, -bound, bound)
    plan.weights["w"] = WeightQuant("w", weight_dtype, 1, weight_scale, codebook=codebook)
    plan.nodes["m"] = NodeDecision("m", "Gemm", "w8a16", "anchor", "", inputs=("x",), weight="w")
    return plan


def quantized(plan: Plan, opset: int = 21) -> ir.Model:
    model = gemm(opset)
    RoundNearest(plan).run(model)
    InsertQDQ(plan).run(model)
    RemoveUnused().run(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def fake_quantized(x: np.ndarray, quant: ActivationQuant) -> np.ndarray:
    kind = stored_type(quant.dtype)
    steps = x / np.float32(quant.scale)
    if quant.dtype in LARGEST:
        stored = np.clip(steps, -LARGEST[quant.dtype], LARGEST[quant.dtype]).astype(kind)
    else:
        info = np.iinfo(quant.dtype)
        stored = np.clip(np.rint(steps) + quant.zero_point, info.min, info.max)
    return (stored.astype(np.float32) - np.float32(quant.zero_point)) * np.float32(quant.scale)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float8_e4m3fn", "float8_e5m2"])
def test_the_output_is_that_of_the_rounded_activations(dtype: str) -> None:
    weight_dtype = dtype if dtype in LARGEST else "int8"
    plan = plan_for(dtype, 2.0, weight_dtype)  # narrower than the data: saturation is part of the meaning
    model = quantized(plan)
    x = random(4, 16) * np.float32(1.5)
    assert np.abs(x).max() > 2.0
    dequantize = next(n for n in model.graph if n.name == "m").inputs[1].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    stored, scale = (constant_array(v) for v in dequantize.inputs[:2])
    assert stored is not None and scale is not None and stored.dtype == stored_type(weight_dtype)
    expected = fake_quantized(x, plan.activations["x"]) @ (stored.astype(np.float32) * scale) + random(
        6, seed=2
    )
    # A few float32 roundings of sums of 16 products, and an int32 bias in steps of 1e-7 where the format has one.
    np.testing.assert_allclose(run_onnxruntime(model, {"x": x})["y"], expected, rtol=0, atol=2e-5)


def test_sixteen_bits_are_256_times_finer_than_eight() -> None:
    x = random(4, 16)
    bound = float(np.abs(x).max())
    plan = plan_for("uint16", bound)
    reference = x @ (
        np.rint(random(16, 6, seed=1) / plan.weights["w"].scale) * plan.weights["w"].scale
    ) + random(6, seed=2)
    error = np.abs(run_onnxruntime(quantized(plan), {"x": x})["y"] - reference).max()
    # 16 roundings of half a step each, times weights of at most 3.
    assert error < 16 * 0.5 * plan.activations["x"].scale * 3


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_weights_are_rounded_as_a_cast_to_the_type_rounds(dtype: str) -> None:
    plan = plan_for(dtype, 2.0, dtype)
    model = quantized(plan)
    dequantize = next(n for n in model.graph if n.name == "m").inputs[1].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    stored = constant_array(dequantize.inputs[0])
    assert stored is not None
    expected = (random(16, 6, seed=1) / plan.weights["w"].scale).astype(stored_type(dtype))
    np.testing.assert_array_equal(stored.astype(np.float32), expected.astype(np.float32))


def test_biases_are_integers_of_integers_and_floats_of_floats() -> None:
    for dtype, kind in (("uint16", "INT32"), ("float8_e4m3fn", "FLOAT")):
        model = quantized(plan_for(dtype, 3.0, dtype if dtype in LARGEST else "int8"))
        bias = next(n for n in model.graph if n.name == "m").inputs[2]
        assert bias is not None
        producer = bias.producer()
        source = bias if producer is None else producer.inputs[0]
        assert source is not None and source.dtype == ir.DataType[kind]


@pytest.mark.parametrize(
    ("dtype", "opset"), [("uint16", 21), ("int16", 21), ("float8_e4m3fn", 21), ("float8_e5m2", 21)]
)
def test_an_opset_without_the_type_is_refused_with_the_one_that_has_it(dtype: str, opset: int) -> None:
    plan = plan_for(dtype, 2.0)
    assert activation_opset(plan.activations.values()) == opset
    with pytest.raises(ModelError, match=f"need opset {opset}, the model has {opset - 1}"):
        InsertQDQ(plan).run(gemm(opset - 1))
    assert InsertQDQ(plan).run(gemm(opset)).changed == 1
    assert activation_opset([ActivationQuant("x", "int8", 1.0, 0, 0.0, 1.0)]) == 0


@pytest.mark.parametrize("dtype", ["uint16", "float8_e4m3fn"])
def test_weights_behind_wide_activations_need_no_work_at_run_time(dtype: str) -> None:
    plan = plan_for(dtype, 2.0, dtype if dtype in LARGEST else "int8")
    model = quantized(plan)
    before = run_onnxruntime(model, {"x": random(4, 16)})["y"]
    weight = next(n for n in model.graph if n.name == "m").inputs[1].producer().inputs[0]  # type: ignore[union-attr]
    assert weight is not None and weight.name is not None
    assert ExpandDequantize(frozenset({weight.name})).run(model).changed == 1
    RemoveUnused().run(model)
    np.testing.assert_array_equal(run_onnxruntime(model, {"x": random(4, 16)})["y"], before)
    activations = 1
    assert count_ops(model)["DequantizeLinear"] == activations + (dtype == "uint16")  # its int32 bias


def test_inserting_wide_activations_twice_changes_nothing() -> None:
    plan = plan_for("int16", 2.0)
    model = quantized(plan)
    before = ir.to_proto(model).SerializeToString()
    assert InsertQDQ(plan).run(model).changed == 0
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("dtype", ["uint16", "float8_e4m3fn"])
def test_onnxruntime_keeps_a_relu_in_front(dtype: str) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 21]>\n'
        "g (float[4,16] z, float[16,6] w, float[6] c) => (float[4,6] y)\n{ x = Relu(z)\n [m] y = Gemm(x, w, c) }"
    )
    model = add_weights(parse(text), w=random(16, 6, seed=1), c=random(6, seed=2))
    plan = plan_for(dtype, 3.0, dtype if dtype in LARGEST else "int8")
    RoundNearest(plan).run(model)
    InsertQDQ(plan).run(model)
    feeds = {"z": random(4, 16)}
    plain = run_onnxruntime(model, feeds)["y"]
    # float32 sums in another order; a Relu that was dropped changes the output by its own size.
    np.testing.assert_allclose(run(open_session(model), feeds)["y"], plain, rtol=0, atol=1e-5)
