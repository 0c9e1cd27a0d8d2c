"""Weights that the file holds in fewer bytes than their kernels read: same results, same kernels, foretold bytes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from weight_only_cases import (
    FLOAT32,
    MATMUL,
    PROFILE,
    TABLE,
    activation_bound,
    array_of,
    build,
    dequantized,
    inputs,
    kernels,
)

from bitwright.compiler.graph.saving import weight_bytes
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.planner import make_plan, plan_selection
from bitwright.compiler.plan.scale_storage import narrowed
from bitwright.compiler.plan.units import FormatChoice
from bitwright.compiler.plan.weights import stored_bytes
from bitwright.passes.block_tables import BlockTables
from bitwright.passes.compact_weights import CompactWeights, is_compact
from bitwright.passes.pack_nbits import PackNBits
from bitwright.passes.raise_opset import RaiseOpset
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_nearest import RoundNearest
from bitwright.passes.stored_weights import needed_opset

COLUMNS = 24


def plan_with(model: ir.Model, fmt: str, storage: str, *, zero_points: bool = True) -> Plan:
    choice = FormatChoice((fmt,), (), (fmt,), {})
    selection = plan_selection(model, PROFILE, "onnxruntime", {}, formats=choice)
    plan = make_plan(selection, {}, PROFILE, "onnxruntime", {}, method="minmax", zero_points=zero_points)
    return narrowed(plan, storage)  # type: ignore[arg-type]


def packed(model: ir.Model, plan: Plan) -> ir.Model:
    result = model.clone()
    RaiseOpset(needed_opset(plan.weights.values())).run(result)
    for step in (BlockTables(plan), RoundNearest(plan), PackNBits(everywhere=True), RemoveUnused()):
        step.run(result)
    return result


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "integer"])
@pytest.mark.parametrize("depth", [64, 192, 512])
@pytest.mark.parametrize("fmt", ["w8", "w4", "w3", "w2"])
def test_products(fmt: str, depth: int, storage: str, zero_points: bool) -> None:
    model = build(MATMUL, depth, COLUMNS)
    plan = plan_with(model, fmt, storage, zero_points=zero_points)
    quant = plan.weights["w"]
    before = packed(model, plan)
    after = before.clone()
    assert (CompactWeights().run(after).changed == 1) == is_compact(quant)
    assert CompactWeights().run(after).changed == 0, "run on its own output it changes nothing"
    RemoveUnused().run(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert "MatMulNBits" in kernels(after) and not {"Cast", "Mul", "BitShift", "Concat"} & set(kernels(after))

    x = inputs(depth)
    found = run(open_session(after), {"x": x})["y"]
    # Symmetric codes of 3 bits count from 4 instead of 8: with zero points the kernel adds in another order.
    shifted = fmt == "w3" and not zero_points
    same = run(open_session(before), {"x": x})["y"]
    np.testing.assert_allclose(found, same, rtol=0, atol=FLOAT32 * np.abs(same).max() if shifted else 0)
    weight = dequantized(array_of(model, "w"), quant)
    expected = x.astype(np.float64) @ weight + array_of(model, "b")
    bound = activation_bound(x, weight, quant.group) + FLOAT32 * np.abs(expected).max()
    assert (np.abs(found - expected) <= bound).all()

    # Packed zero points fill whole bytes, column by column; shifts, masks and shapes are a few bytes.
    extra = weight_bytes(after) - 4 * COLUMNS - stored_bytes(quant, depth * COLUMNS)
    assert 0 <= extra <= COLUMNS + 64


@pytest.mark.parametrize("storage", ["float32", "integer"])
@pytest.mark.parametrize("fmt", ["w8", "w4", "w3", "w2"])
def test_a_table_that_is_the_head_too_is_stored_once(fmt: str, storage: str) -> None:
    rows, depth = 800, 96
    model = build(TABLE, w=np.random.default_rng(0).normal(size=(rows, depth)))
    plan = plan_with(model, fmt, storage)
    result = packed(model, plan)
    CompactWeights().run(result)
    RemoveUnused().run(result)
    onnx.checker.check_model(ir.to_proto(result), full_check=True)
    quant = plan.weights["w (table)"]
    extra = weight_bytes(result) - stored_bytes(quant, rows * depth)
    assert 0 <= extra <= rows + 64
    assert kernels(result) == ["GatherBlockQuantized", "MatMulNBits"]

    table, at = dequantized(array_of(model, "w"), quant), np.array([[0, 799, 5]])
    looked_up = table[at[0]]
    expected = looked_up @ table.T
    bound = activation_bound(looked_up, table.T, quant.group) + FLOAT32 * np.abs(expected).max()
    assert (np.abs(run(open_session(result), {"i": at})["y"][0] - expected) <= bound).all()


def test_weights_of_four_bits_stay_as_they_are() -> None:
    """Codes that need their highest bit, scales that no shorter form holds."""
    model = build(MATMUL, 64, COLUMNS)
    result = packed(model, plan_with(model, "w4", "float32"))
    assert CompactWeights().run(result).changed == 0
