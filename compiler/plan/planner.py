"""Turn a selection and calibrated ranges into a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.cost import Shapes, node_macs
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.plan.cost import estimate_call
from bitwright.compiler.plan.measured import Estimate
from bitwright.compiler.plan.model import ActivationQuant, NodeDecision, Plan
from bitwright.compiler.plan.quantizers import activation_params
from bitwright.compiler.plan.selection import Selection, select
from bitwright.compiler.plan.ties import tie_groups
from bitwright.compiler.plan.units import INT8, FormatChoice, Unit, build_units
from bitwright.compiler.plan.weights import plan_weight
from bitwright.targets.schema import OpRule, Profile, Runtime

RuntimeName = Literal["artifact", "onnxruntime"]
Ranges = Mapping[str, tuple[float, float]]


def runtime_of(profile: Profile, name: RuntimeName) -> Runtime:
    """Return the profile's table for one of the two runtimes."""
    return profile.runtimes.artifact if name == "artifact" else profile.runtimes.onnxruntime


def plan_selection(
    model: ir.Model,
    profile: Profile,
    runtime: RuntimeName,
    shapes: Shapes,
    *,
    keep_float: frozenset[str] = frozenset(),
    formats: FormatChoice = INT8,
    alone: bool = False,
) -> Selection:
    """Choose what runs on integers; needs no data.

    Args:
        model: A normalized model.
        profile: The target.
        runtime: Which of the profile's tables to plan for.
        shapes: Static shape of every tensor at the planning sizes.
        keep_float: Names of nodes that must stay in float.
        formats: Which of the target's formats may be used.
        alone: What stands between layers in float stays float, too, also on a target that computes integers only:
            to see what single layers lose.
    """
    table = runtime_of(profile, runtime)
    units = build_units(model, table, profile, formats)
    everything = table.integer_only and not alone
    first = select(units, profile, keep_float=keep_float, integer_only=everything)
    small = frozenset(u.name for u in first.integer if u.rule and _is_small(u, u.rule, shapes))
    if not small:
        return first
    return select(units, profile, keep_float=keep_float | small, integer_only=everything)


def _is_small(unit: Unit, rule: OpRule, shapes: Shapes) -> bool:
    """Tell whether an anchor is smaller than the target's kernel is worth."""
    if macs_of(unit, shapes) < rule.min_macs:
        return True
    rows, columns = shapes.get(unit.head.inputs[0].name or ""), shapes.get(unit.output.name or "")  # type: ignore[union-attr]
    if rule.min_rows == 1 or unit.head.op_type == "Conv" or not rows or not columns:
        return False
    return min(math.prod(rows[:-1]), columns[-1]) < rule.min_rows


def macs_of(unit: Unit, shapes: Shapes) -> int:
    """Return the multiply-accumulates of one call at the planning shape, 0 where a shape is unknown."""
    try:
        return node_macs(unit.head, shapes)
    except ModelError:
        return 0


def observed_tensors(selection: Selection) -> tuple[str, ...]:
    """Return the names of the tensors whose ranges the plan needs."""
    return tuple(v.name or "" for v in selection.quantized)


def make_plan(
    selection: Selection,
    ranges: Ranges,
    profile: Profile,
    runtime: RuntimeName,
    shapes: Shapes,
    *,
    method: str,
    group: int | None = None,
    zero_points: bool = True,
) -> Plan:
    """Write down every decision.

    Args:
        selection: From :func:`plan_selection`.
        ranges: Calibrated (low, high) of every observed tensor, real units.
        profile: The target.
        runtime: The table the selection was made for.
        shapes: Static shape of every tensor at the planning sizes.
        method: Calibration method, for the record.
        group: Weights that share a scale in grouped formats; None takes the kernel's first choice.
        zero_points: Groups may have zero points, where the kernel takes any.
    """
    plan = Plan(profile.name, runtime)
    plan.activations = _activations(selection, ranges, profile, method)
    for unit in selection.units:
        decision = _decide(unit, selection, plan, profile, group, zero_points)
        if unit.role:
            decision = _with_costs(decision, unit, plan, profile, shapes)
        plan.nodes[unit.name] = decision
    return plan


def _with_costs(
    decision: NodeDecision, unit: Unit, plan: Plan, profile: Profile, shapes: Shapes
) -> NodeDecision:
    """Add the cost model's figures; an operator whose shapes are unknown keeps zeros."""

    def found(fmt: str) -> Estimate:
        is_float = decision.output == "float" and fmt != "float"
        return estimate_call(unit.head, shapes, profile, plan.runtime, fmt, float_output=is_float)

    try:
        chosen = found(decision.format if unit.combo is not None else "float")
        return replace(
            decision,
            macs=node_macs(unit.head, shapes),
            estimated_s=chosen.seconds,
            estimated_float_s=found("float").seconds,
            estimate=chosen.source,
        )
    except ModelError:
        return decision


def _reading_space(name: str, selection: Selection) -> str:
    """Return the qspace its integer readers want, else the one its producer writes."""
    for unit in selection.units:
        if unit in selection.integer and unit.combo and any(v.name == name for v in unit.activations):
            return unit.combo.act
    producer = next(u for u in selection.units if u.output.name == name)
    assert producer.combo is not None
    return producer.combo.act


def _activations(
    selection: Selection, ranges: Ranges, profile: Profile, method: str
) -> dict[str, ActivationQuant]:
    prescribed = _prescribed(selection, profile)
    groups = tie_groups(selection, prescribed)
    result: dict[str, ActivationQuant] = {}
    for value in selection.quantized:
        name = value.name or ""
        members = groups[name]
        low, high = _range(members, ranges, prescribed)
        dtype, scale, zero_point = activation_params(
            low, high, profile.qspace(_reading_space(members[0], selection))
        )
        result[name] = ActivationQuant(
            name,
            dtype,
            scale,
            zero_point,
            min(low, 0.0),
            max(high, 0.0),
            tie=members[0] if len(members) > 1 else "",
            method=method,
            float_copy=value in selection.float_readers,
        )
    return result


def _prescribed(selection: Selection, profile: Profile) -> Ranges:
    """Return the ranges that the target prescribes for what some operators write."""
    found = {}
    for unit in selection.units:
        if unit in selection.integer and unit.combo is not None:
            fixed = profile.qspace(unit.combo.out[0]).fixed_range
            if fixed is not None:
                found[unit.output.name or ""] = fixed
    return found


def _range(members: tuple[str, ...], ranges: Ranges, prescribed: Ranges) -> tuple[float, float]:
    """Return the range of tensors that share a scale: the prescribed one, else what covers them all."""
    fixed = next((prescribed[m] for m in members if m in prescribed), None)
    return fixed or (min(ranges[m][0] for m in members), max(ranges[m][1] for m in members))


def _decide(
    unit: Unit, selection: Selection, plan: Plan, profile: Profile, group: int | None, zero_points: bool
) -> NodeDecision:
    if unit not in selection.integer:
        reason = selection.reasons.get(unit.name, "")
        return NodeDecision(
            unit.name,
            unit.head.op_type,
            unit.float_format,
            unit.role,
            reason,
            constant_weight=weight_of(unit.head) is not None,
        )
    output = "int" if unit.output.name in plan.activations else "float"
    assert unit.combo is not None
    return NodeDecision(
        unit.name,
        unit.head.op_type,
        unit.combo.format,
        unit.role,
        selection.reasons[unit.name],
        inputs=tuple(v.name or "" for v in unit.activations),
        output=output,  # type: ignore[arg-type]
        weight=plan_weight(unit, plan, profile, group, zero_points=zero_points),
        constant_weight=weight_of(unit.head) is not None,
    )
