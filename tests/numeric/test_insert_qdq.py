"""The inserted Q/DQ: golden structure, types and zero points, numerics in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from plan_models import CNN, CONCAT, MLP_ISLANDS, build

from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.ort.audit import audit
from bitwright.compiler.ort.layer_error import layer_errors
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session, run
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.planner import make_plan, observed_tensors, plan_selection
from bitwright.passes.insert_qdq import InsertQDQ
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_nearest import RoundNearest
from bitwright.targets.loader import load_profile

PROFILE = load_profile("x86-avx512-vnni")


def feeds_for(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {v.name or "": random.normal(size=v.shape.numpy()).astype(np.float32) for v in model.graph.inputs}  # type: ignore[union-attr]


def exact_ranges(model: ir.Model, tensors: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    copy = model.clone()
    values = {o.name: o for n in copy.graph for o in n.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[t] for t in tensors if t in values)
    session = open_session(copy)
    lows: dict[str, list[float]] = {t: [] for t in tensors}
    for seed in range(8):
        feeds = feeds_for(model, seed)
        for name, array in {**run(session, feeds), **feeds}.items():
            if name in lows:
                lows[name] += [float(array.min()), float(array.max())]
    return {name: (min(found), max(found)) for name, found in lows.items()}


def quantized(text: str, runtime: str = "onnxruntime") -> tuple[ir.Model, ir.Model, Plan]:
    model = build(text)
    selection = plan_selection(model, PROFILE, runtime, {})  # type: ignore[arg-type]
    ranges = exact_ranges(model, observed_tensors(selection))
    plan = make_plan(selection, ranges, PROFILE, runtime, {}, method="minmax")  # type: ignore[arg-type]
    result = model.clone()
    assert RoundNearest(plan).run(result).changed == sum(bool(d.weight) for d in plan.nodes.values())
    assert InsertQDQ(plan).run(result).changed == len(plan.activations)
    RemoveUnused().run(result)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    return model, result, plan


def operators(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph if n.op_type not in ("QuantizeLinear", "DequantizeLinear")]


@pytest.mark.parametrize("text", [CNN, MLP_ISLANDS, CONCAT])
@pytest.mark.parametrize("runtime", ["artifact", "onnxruntime"])
def test_only_quantizers_are_added_and_names_are_kept(text: str, runtime: str) -> None:
    model, result, _ = quantized(text, runtime)
    assert operators(result) == operators(model)
    assert [v.name for v in result.graph.inputs] == [v.name for v in model.graph.inputs]
    assert [v.name for v in result.graph.outputs] == [v.name for v in model.graph.outputs]


@pytest.mark.parametrize("text", [CNN, MLP_ISLANDS, CONCAT])
def test_every_quantizer_has_an_explicit_zero_point_of_its_type(text: str) -> None:
    _, result, _ = quantized(text)
    for node in result.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.inputs) == 3, node.name
            zero = constant_array(node.inputs[2])
            integers = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
            assert zero is not None
            assert integers is not None
            assert integers.dtype == ir.DataType[zero.dtype.name.upper()]


def test_biases_are_int32_with_the_product_scale() -> None:
    _, result, plan = quantized(CNN)
    conv = next(n for n in result.graph if n.name == "c1")
    dequantize = conv.inputs[2].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    integers, scale = (constant_array(v) for v in dequantize.inputs[:2])
    assert integers is not None and scale is not None
    assert integers.dtype == np.int32
    expected = np.float32(plan.activations["x"].scale) * plan.weights["w1"].scale
    np.testing.assert_array_equal(scale, expected)


@pytest.mark.parametrize("text", [CNN, MLP_ISLANDS, CONCAT])
def test_int8_noise_is_what_eight_bits_cost(text: str) -> None:
    model, result, plan = quantized(text)
    feeds = [feeds_for(model, seed) for seed in range(8)]
    noise = layer_errors(model, result, tuple(plan.activations), feeds)
    # Uniform 8-bit rounding of a full-range signal gives about 50 dB minus its peak-to-rms ratio (10 to 15 dB here);
    # a few layers add up. A wrong scale, axis or zero point ends near 0 dB.
    assert min(noise.values()) > 20.0, noise


@pytest.mark.parametrize("text", [CNN, MLP_ISLANDS, CONCAT])
def test_onnxruntime_fuses_every_quantized_operator(text: str) -> None:
    _, result, _ = quantized(text)
    found = audit(result, config_for(PROFILE.runtimes.onnxruntime))
    assert found.unexpected == ()
    assert any(name.startswith("QLinear") or "Integer" in name or name == "QGemm" for name in found.operators)


def test_the_audit_names_an_operator_that_stays_float() -> None:
    _, result, _ = quantized(CNN, "onnxruntime")
    gemm = next(n for n in result.graph if n.name == "g")
    dequantize = gemm.inputs[1].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    dequantize.replace_input_with(2, None)  # ONNX Runtime does not fuse a Gemm whose weight has no zero point
    found = audit(result, SessionConfig()).unexpected
    assert any("Gemm" in f.why or "no integer kernel" in f.why for f in found)


@pytest.mark.parametrize("text", [CNN, MLP_ISLANDS, CONCAT])
def test_inserting_twice_changes_nothing(text: str) -> None:
    _, result, plan = quantized(text)
    before = ir.to_proto(result).SerializeToString()
    again = InsertQDQ(plan).run(result)
    assert again.changed == 0
    assert ir.to_proto(result).SerializeToString() == before


def test_a_quantized_value_that_is_a_graph_output_keeps_its_name() -> None:
    _, result, plan = quantized(CONCAT, "onnxruntime")
    assert "y" in plan.activations
    (output,) = result.graph.outputs
    producer = output.producer()
    assert output.name == "y"
    assert producer is not None and producer.op_type == "DequantizeLinear"
