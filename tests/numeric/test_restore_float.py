"""Single layers back to float: all of them give the float model again, and a bad one is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from plan_models import CNN, MLP_ISLANDS
from test_insert_qdq import feeds_for, quantized

from bitwright.compiler.graph.model import node_label
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.ort.what_if import what_if_float
from bitwright.passes.insert_qdq import InsertQDQ
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.restore_float import RestoreFloat
from bitwright.passes.round_nearest import RoundNearest


@pytest.mark.parametrize("text", [CNN, MLP_ISLANDS])
def test_restoring_every_node_gives_the_float_model(text: str) -> None:
    model, result, plan = quantized(text)
    every = RestoreFloat(frozenset(map(node_label, model.graph)), model)
    assert every.run(result).changed
    assert every.run(result).changed == 0
    RemoveUnused().run(result)
    left = [n.op_type for n in result.graph if n.op_type == "QuantizeLinear"]
    # Only a graph output that is written as integers may still be rounded.
    assert len(left) <= len(model.graph.outputs)
    feeds = feeds_for(model, 3)
    step = max(
        (a.scale for t, a in plan.activations.items() if t in {o.name for o in model.graph.outputs}),
        default=0,
    )
    for name, exact in run(open_session(model), feeds).items():
        np.testing.assert_allclose(run(open_session(result), feeds)[name], exact, rtol=1e-5, atol=1e-5 + step)


def test_parts_are_restored_alone() -> None:
    model, result, _ = quantized(MLP_ISLANDS)
    node = next(n for n in result.graph if n.op_type == "MatMul" and n.inputs[1].producer() is not None)  # type: ignore[union-attr]
    name = node_label(node)
    RestoreFloat(frozenset([name]), model, frozenset(["weights"])).run(result)
    data, weight = node.inputs[0], node.inputs[1]
    assert data is not None and weight is not None
    assert data.producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    assert weight.is_initializer()


def _with_coarse_weight(layer: str) -> tuple[ir.Model, ir.Model]:
    """Quantize the convolutional model with one weight's scales 12 times too large."""
    model, _, plan = quantized(CNN)
    key = next(d.weight for d in plan.nodes.values() if d.node == layer)
    plan.weights[key] = replace(plan.weights[key], scale=plan.weights[key].scale * 12)
    result = model.clone()
    for rewrite in (RoundNearest(plan), InsertQDQ(plan), RemoveUnused()):
        rewrite.run(result)
    return model, result


def test_the_layer_that_costs_most_is_found_and_so_is_its_part() -> None:
    layers = [node_label(n) for n in quantized(CNN)[0].graph if n.op_type == "Conv"]
    model, result = _with_coarse_weight(layers[0])
    found = what_if_float(model, result, layers, [feeds_for(model, k) for k in range(3)])
    assert found[0].node == layers[0]
    assert found[0].gain_db > 3  # twelve times the rounding error of one of two layers
    assert found[0].weights_db > found[0].inputs_db
