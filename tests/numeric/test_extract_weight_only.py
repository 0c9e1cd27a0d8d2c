"""Blocked weights behind MatMul, Gemm and MatMulNBits become WeightOnlyDot, which computes what ONNX Runtime does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from weight_only_cases import (
    GEMM,
    GOLDEN,
    INTEGER_FORMATS,
    MATMUL,
    TWO_READERS,
    activation_bound,
    array_of,
    build,
    dequantized,
    inputs,
    plan_of,
    quantized,
)

from bitwright.compiler.graph.model import int_attribute
from bitwright.compiler.interpret.island import OrtRunner
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import FloatIsland, Program, WeightOnlyDot
from bitwright.passes.normalize import specialize
from bitwright.passes.rewriting import add_initializer

ROWS = 5


def static(model: ir.Model) -> ir.Model:
    """Fix the number of rows."""
    specialize(model, {"m": ROWS})
    return model


def described(program: Program) -> str:
    """Return the program's steps, one a line, and its notes."""
    lines = []
    for step in program.steps:
        kind = type(step).__name__
        if isinstance(step, WeightOnlyDot):
            depth, columns = step.weight.shape
            bias = "" if step.bias is None else " + bias"
            kind += f" {step.bits} bits, {depth} x {columns} in groups of {step.group}{bias}"
        lines.append(f"{step.name}: {kind}, {' '.join(step.inputs)} -> {' '.join(step.outputs)}")
        lines.append(f"  covers {', '.join(step.nodes)}")
    return "\n".join([*lines, *program.notes]) + "\n"


def products(program: Program) -> list[WeightOnlyDot]:
    return [s for s in program.steps if isinstance(s, WeightOnlyDot)]


@pytest.mark.parametrize("everywhere", [False, True], ids=["standard", "contrib"])
@pytest.mark.parametrize(("depth", "columns"), [(64, 48), (70, 47), (16, 1)])
@pytest.mark.parametrize("text", [MATMUL, GEMM], ids=["matmul", "gemm"])
@pytest.mark.parametrize("fmt", INTEGER_FORMATS)
def test_every_integer_format(fmt: str, text: str, depth: int, columns: int, everywhere: bool) -> None:
    model = build(text, depth, columns)
    plan = plan_of(model, fmt)
    weight = dequantized(array_of(model, "w"), plan.weights["w"])
    program = extract_program(static(quantized(model, plan, everywhere=everywhere)))
    (step,) = program.steps
    assert isinstance(step, WeightOnlyDot)
    assert program.notes == ()
    real = (
        step.weight.astype(int) - np.repeat(step.zero_point.astype(int), step.group, axis=0)[:depth]
    ) * np.repeat(step.scale.astype(np.float64), step.group, axis=0)[:depth]
    np.testing.assert_allclose(real, weight, rtol=1e-12)
    np.testing.assert_array_equal(step.bias, array_of(model, "b"))

    x = inputs(depth, ROWS)
    expected = x.astype(np.float64) @ weight + array_of(model, "b")
    got = run_program(program, {"x": x})["y"]
    bound = activation_bound(x, weight, step.group) + 2e-6 * np.abs(expected).max()
    assert (np.abs(got - expected) <= bound).all()


def test_equals_onnxruntime_at_accuracy_level_4() -> None:
    """Same arithmetic up to the order of float sums, and ties of the rounding of activations."""
    model = build(MATMUL, 256, 64)
    deployed = quantized(model, plan_of(model, "w4"), everywhere=True)
    x = inputs(256, ROWS)
    theirs = run(open_session(deployed), {"x": x})["y"]
    ours = run_program(extract_program(static(deployed)), {"x": x})["y"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_readers_of_one_weight_each_get_a_step() -> None:
    model = build(TWO_READERS)
    program = extract_program(static(quantized(model, plan_of(model, "w4"))))
    assert len(products(program)) == 3
    x = inputs(70, ROWS)
    got = run_program(program, {"x": x}, float_runner=OrtRunner())["y"]
    weight = dequantized(array_of(model, "w"), plan_of(model, "w4").weights["w"])
    expected = x.astype(np.float64) @ weight + array_of(model, "b")
    bound = activation_bound(x, weight, 32) + 2e-6 * np.abs(expected).max()
    assert (np.abs(got - expected) <= bound).all()


def test_golden() -> None:
    model = build(TWO_READERS, 64, 4)
    program = extract_program(static(quantized(model, plan_of(model, "w4"))))
    path: Path = GOLDEN / "weight_only_program.txt"
    assert described(program) == path.read_text()


def refused(model: ir.Model) -> str:
    program = extract_program(static(model))
    assert all(isinstance(s, FloatIsland) for s in program.steps)
    (note,) = program.notes
    return note


@pytest.mark.parametrize("level", [0, 1])
def test_an_accuracy_level_that_forbids_rounding_is_respected(level: int) -> None:
    model = build(MATMUL)
    deployed = quantized(model, plan_of(model, "w4"), everywhere=True, level=level)
    assert "forbids rounding activations" in refused(deployed)


def edited(**attributes: object) -> ir.Model:
    """Return a model whose blocked weight has other attributes."""
    model = build(MATMUL, 64, 64)
    result = quantized(model, plan_of(model, "w4"))
    node = next(n for n in result.graph if n.op_type == "DequantizeLinear")
    for name, value in attributes.items():
        node.attributes[name] = ir.Attr(name, ir.AttributeType.INT, value)
    return result


def test_blocks_along_the_columns_stay_float() -> None:
    model = edited(axis=1)
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    for k in (1, 2):
        value = node.inputs[k]
        assert value is not None
        turned = np.ascontiguousarray(array_of(model, value.name or "").T)
        node.replace_input_with(k, add_initializer(model.graph, f"{value.name}_turned", turned))
    assert "across the columns" in refused(model)


def test_scales_that_are_not_finite_stay_float() -> None:
    model = edited()
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    scale = array_of(model, node.inputs[1].name or "").copy()  # type: ignore[union-attr]
    scale[0, 0] = np.inf
    node.replace_input_with(1, add_initializer(model.graph, "infinite", scale))
    assert "not finite" in refused(model)


def test_group_indices_stay_float() -> None:
    model = build(MATMUL)
    deployed = quantized(model, plan_of(model, "w4"), everywhere=True)
    node = next(n for n in deployed.graph if n.op_type == "MatMulNBits")
    indices = add_initializer(deployed.graph, "indices", np.arange(70, dtype=np.int32) // 32)
    node.resize_inputs(5)
    node.replace_input_with(4, indices)
    assert "group indices" in refused(deployed)


def test_zero_points_of_every_kind_are_read() -> None:
    """Per group in the contrib form: packed along the groups, whose number is odd here."""
    model = build(MATMUL, 90, 6)
    result = quantized(model, plan_of(model, "w4"), everywhere=True)
    node = next(n for n in result.graph if n.op_type == "MatMulNBits")
    zeros = np.random.default_rng(5).integers(0, 256, (6, 2)).astype(np.uint8)
    node.resize_inputs(max(len(node.inputs), 4))
    node.replace_input_with(3, add_initializer(result.graph, "zeros", zeros.reshape(-1)))
    x = inputs(90, ROWS)
    theirs = run(open_session(result, SessionConfig()), {"x": x})["y"]
    (step,) = products(extract_program(static(result)))
    assert step.zero_point[0, 0] == zeros[0, 0] & 15
    assert step.zero_point[1, 0] == zeros[0, 0] >> 4
    assert int_attribute(node, "K", 0) == 90
    ours = run_program(extract_program(result), {"x": x}, float_runner=OrtRunner())["y"]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())
    onnx.checker.check_model(ir.to_proto(result))
