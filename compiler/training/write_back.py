"""From a trained module to the plan and the float model that round to exactly the integers it was trained with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import torch

from bitwright.compiler.errors import ModelError
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.quantizers import BIAS_LIMIT
from bitwright.compiler.training.graph_module import GraphModule


def trained_plan(student: GraphModule) -> Plan:
    """Return the plan with the scales that were learned.

    Raises:
        ModelError: A bias does not fit the accumulator at the learned scales.
    """
    points = student.points
    assert points is not None, "the student rounds"
    plan = points.plan
    activations = {
        name: replace(
            points.activation(name).learned(), tensor=name, float_copy=quant.float_copy, tie=quant.tie
        )
        for name, quant in plan.activations.items()
    }
    names = points.weight_names
    weights = {
        key: points.weight(key).learned(_as_read(student, names[key])) if key in names else quant
        for key, quant in plan.weights.items()
    }
    found = replace(plan, activations=activations, weights=weights)
    _check_biases(student, found)
    return found


def _as_read(student: GraphModule, source: tuple[str, tuple[int, ...] | None]) -> torch.Tensor:
    """Return a weight as its reader sees it: transposed where it reads it through a Transpose."""
    name, order = source
    weight = student.weight(name)
    return weight if order is None else weight.permute(order)


def _check_biases(student: GraphModule, plan: Plan) -> None:
    for label, bias in (student.points.biases if student.points is not None else {}).items():
        decision = plan.nodes[label]
        scale = plan.activations[decision.inputs[0]].scale * plan.weights[decision.weight].scale
        values = student.weight(bias).detach().numpy() if student.trains(bias) else np.zeros(1)
        if float(np.abs(values / scale).max()) > BIAS_LIMIT:
            what = "its bias does not fit 32 bits at the scales that training found"
            raise ModelError(what, where=f"node '{label}'", fix="keep the layer in float: --keep-float")


def with_trained_weights(model: ir.Model, student: GraphModule) -> ir.Model:
    """Return a copy of the float model with the trained weights, tables, biases and gains in place."""
    result = model.clone()
    for name in student.trained:
        array = np.ascontiguousarray(student.weight(name).detach().numpy())
        value = result.graph.initializers[name]
        value.const_value = ir.Tensor(array, name=name)
    return result
