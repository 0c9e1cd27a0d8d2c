"""Weight scales of least error in the place of max-abs ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.model import constant_array, int_attribute, node_label
from bitwright.compiler.graph.operands import table_of, weight_array, weight_of
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.plan.quantizers import widen_for_bias
from bitwright.compiler.plan.weight_grids import grid_of, layout_of, matrices_of, quantizer_of, with_scales
from bitwright.compiler.rounding.grid import Grid
from bitwright.compiler.rounding.objective import DAMPING
from bitwright.compiler.rounding.scale_search import search_scales


def search_weight_scales(plan: Plan, model: ir.Model, moments: Mapping[str, InputMoments]) -> Plan:
    """Return the plan with scales (and zero points where there are any) of least output error.

    The error of a weight counts as much as its input's mean square; without moments all count alike. Axis, groups
    and types stay as planned. Where a bias would not fit int32 with the new scale, it is widened again. Tables in
    groups get the scales of the product that reads them transposed (a tied head), or of least error in themselves;
    other tables and weights in half precision keep what they have.

    Args:
        plan: Not changed.
        model: The float model that the plan was made for.
        moments: Input moments by node name; may lack any.

    Raises:
        ModelError: A weight is not finite.
        InternalError: Moments are of another form of the model.
    """
    weights = dict(plan.weights)
    for key, nodes in readers_of(plan, model).items():
        weights[key] = _searched(plan.weights[key], nodes, plan, moments)
    found = replace(plan, weights=weights)
    for node in model.graph:
        decision = plan.nodes.get(node_label(node))
        if decision is not None and decision.role == "table" and decision.weight:
            weights[decision.weight] = _searched_table(weights[decision.weight], node, found, model)
    return found


def _searched_table(quant: WeightQuant, node: ir.Node, plan: Plan, model: ir.Model) -> WeightQuant:
    """Return a table's entry, groups along its rows, with better scales."""
    table, grid = constant_array(table_of(node)), grid_of(quant)
    if table is None or grid is None or not quant.group or quant.codebook or quant.axis != 1:
        return quant
    head = tied_head(quant, table, plan, model)
    if head is not None:
        return with_scales_of(quant, head)
    columns = np.ascontiguousarray(table.T, np.float32)[None]
    found = search_scales(columns, np.ones(columns.shape[:2]), grid, layout_of(quant))
    scale = np.ascontiguousarray(found.scale[0].T)
    if quant.zero_point is None or found.zero_point is None:
        return replace(quant, scale=scale)
    zero = np.rint(found.zero_point[0].T).astype(quant.zero_point.dtype)
    return replace(quant, scale=scale, zero_point=np.ascontiguousarray(zero))


def tied_head(
    quant: WeightQuant, table: NDArray[np.generic], plan: Plan, model: ir.Model
) -> WeightQuant | None:
    """Return the entry of a product by the transposed table that has groups of the same kind, or None.

    Args:
        quant: The table's entry.
        table: Its elements, float32.
        plan: Of the product.
        model: Where the product is.
    """
    for node in model.graph:
        decision, weight = plan.nodes.get(node_label(node)), weight_of(node)
        if decision is None or not decision.weight or weight is None or node.op_type != "MatMul":
            continue
        entry = plan.weights[decision.weight]
        alike = (entry.axis, entry.group, entry.dtype, entry.bits) == (
            0,
            quant.group,
            quant.dtype,
            quant.bits,
        )
        if (
            alike
            and weight_array(weight).shape == table.T.shape
            and np.array_equal(weight_array(weight), table.T)
        ):
            return entry
    return None


def with_scales_of(quant: WeightQuant, other: WeightQuant) -> WeightQuant:
    """Return the entry of a matrix with the scales of its transpose."""
    zero = None if other.zero_point is None else np.ascontiguousarray(other.zero_point.T)
    storage = other.scale_storage
    return replace(quant, scale=np.ascontiguousarray(other.scale.T), zero_point=zero, scale_storage=storage)


def readers_of(plan: Plan, model: ir.Model) -> dict[str, list[ir.Node]]:
    """Return the anchors of the main graph that read each weight entry of the plan, as equal matrices.

    Should a weight be read in two geometries, those of the first reader count.
    """
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        decision = plan.nodes.get(node_label(node))
        if decision is None or not decision.weight or matrices_of(node) is None:
            continue
        readers = found.setdefault(decision.weight, [])
        if not readers or _geometry(readers[0]) == _geometry(node):
            readers.append(node)
    return found


def _geometry(node: ir.Node) -> tuple[bool, int]:
    return node.op_type == "Conv", int_attribute(node, "group", 1)


def known_moments(nodes: Sequence[ir.Node], moments: Mapping[str, InputMoments]) -> list[InputMoments]:
    """Return the moments of those readers of one weight that have any.

    Raises:
        InternalError: They are of other matrices, as after a rewrite that changed the layer.
    """
    known = {label: moments[label] for n in nodes if (label := node_label(n)) in moments}
    weights = matrices_of(nodes[0])
    for label, found in known.items():
        if weights is None or weights.shape[:2] != (found.groups, found.depth):
            msg = "the input moments do not fit the weight; they were collected on another form of the model"
            raise InternalError(msg, where=f"node '{label}'")
    return list(known.values())


def _searched(
    quant: WeightQuant, nodes: Sequence[ir.Node], plan: Plan, moments: Mapping[str, InputMoments]
) -> WeightQuant:
    weights, grid = matrices_of(nodes[0]), grid_of(quant)
    assert weights is not None
    if grid is None or quantizer_of(quant, nodes[0], len(weights)) is None:
        return quant
    if quant.dtype.startswith("uint") and quant.zero_point is None and not quant.codebook:
        middle = 2 ** (quant.bits - 1)
        grid = Grid(grid.name, grid.values - middle)
    importance = importance_of(nodes, moments, weights.shape[:2])
    found = with_scales(quant, search_scales(weights, importance, grid, layout_of(quant)))
    for node in nodes:
        found = _widened(found, node, plan)
    return found


def importance_of(
    nodes: Sequence[ir.Node], moments: Mapping[str, InputMoments], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Return the mean square of each input over all readers, damped like the objective of rounding."""
    known = known_moments(nodes, moments)
    if not known:
        return np.ones(shape)
    power = sum((m.power * m.count for m in known), np.zeros(shape)) / sum(m.count for m in known)
    mean = power.mean(axis=1, keepdims=True)
    found: NDArray[np.float64] = power + np.where(mean > 0, DAMPING * mean, 1.0)
    return found


def _widened(quant: WeightQuant, node: ir.Node, plan: Plan) -> WeightQuant:
    bias = constant_array(node.inputs[2]) if node.op_type != "MatMul" and len(node.inputs) > 2 else None
    inputs = plan.nodes[node_label(node)].inputs
    known = plan.activations.get(inputs[0]) if inputs else None
    if bias is None or known is None or quant.group or quant.axis is None:
        return quant
    return replace(quant, scale=widen_for_bias(quant.scale, bias, known.scale))
