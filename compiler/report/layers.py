"""The report's rows about layers: decision, quantizers, own and accumulated noise, cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.graph.model import constant_array, node_label
from bitwright.compiler.graph.operands import stored_weight, table_of, weight_of
from bitwright.compiler.plan.model import NodeDecision, Plan, WeightQuant
from bitwright.compiler.plan.units import Unit

FLOAT_BITS, HALF_BITS = 32, 16


def layer_rows(c: Compilation, plan: Plan) -> list[dict[str, Any]]:
    """Return a row for every operator that the profile has a rule for, in graph order."""
    units = _units(c)
    return [_layer(d, c, plan, units.get(d.node)) for d in plan.nodes.values() if d.role]


def _units(c: Compilation) -> dict[str, Unit]:
    return {} if c.selection is None else {unit.name: unit for unit in c.selection.units}


def _layer(decision: NodeDecision, c: Compilation, plan: Plan, unit: Unit | None) -> dict[str, Any]:
    """Return one row; the noise is that of what the operator and the nodes fused behind it write."""
    output = "" if unit is None else unit.output.name or ""
    reads = plan.activations.get(decision.inputs[0]) if decision.inputs else None
    writes = plan.activations.get(output)
    weight = plan.weights.get(decision.weight)
    scaled = weight is not None and granularity(weight) != "none"
    return {
        **asdict(decision),
        "input_quant": None if reads is None else asdict(reads),
        "output_quant": None if writes is None else asdict(writes),
        "weight_quant": None if weight is None else _weight(weight),
        "fused": [] if unit is None else [node_label(node) for node in unit.tail],
        "sqnr_db": c.sqnr_db.get(output),
        "own_sqnr_db": c.own_db.get(output),
        "measured_s": _measured(decision.node, c),
        "parameters": 0 if unit is None else _parameters(unit),
        "weight_scales": int(weight.scale.size) if weight is not None and scaled else None,
        "weight_scale_min": float(weight.scale.min()) if weight is not None and scaled else None,
        "weight_scale_max": float(weight.scale.max()) if weight is not None and scaled else None,
    }


def _weight(quant: WeightQuant) -> dict[str, Any]:
    return {
        "bits": quant.bits,
        "group": quant.group,
        "codebook": quant.codebook,
        "dtype": quant.dtype,
        "granularity": granularity(quant),
        "axis": quant.axis,
        "scales": int(quant.scale.size),
        "zero_points": quant.zero_point is not None,
    }


def granularity(quant: WeightQuant) -> str:
    """Return what has a scale of its own: ``group``, ``channel``, ``tensor``, or ``none`` in half precision."""
    if quant.group:
        return "group"
    if quant.axis is not None:
        return "channel"
    return "none" if quant.dtype in ("float16", "bfloat16") else "tensor"


def _measured(node: str, c: Compilation) -> float | None:
    """Return the best seconds of a node's integer kernels, where the artifact ran natively."""
    return None if c.verification is None else c.verification.step_seconds.get(node)


def _parameters(unit: Unit) -> int:
    weight = stored_weight(weight_of(unit.head)) or table_of(unit.head)
    array = constant_array(weight)
    return 0 if array is None else int(array.size)


def parameters_by_bits(c: Compilation, plan: Plan) -> dict[str, int]:
    """Return how many weights of layers are stored in how many bits; one that several layers read counts once."""
    found: Counter[str] = Counter()
    seen = set()
    for unit in c.selection.units if c.selection is not None else ():
        decision = plan.nodes.get(unit.name)
        stored = stored_weight(weight_of(unit.head)) or table_of(unit.head)
        if decision is None or stored is None or (stored, decision.weight) in seen:
            continue
        seen.add((stored, decision.weight))
        found[str(_bits(decision, plan))] += _parameters(unit)
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def _bits(decision: NodeDecision, plan: Plan) -> int:
    quant = plan.weights.get(decision.weight)
    if quant is not None:
        return quant.bits
    return HALF_BITS if decision.format in ("fp16", "bf16") else FLOAT_BITS


def noise_rows(c: Compilation) -> list[dict[str, Any]]:
    """Return the noise of every measured tensor, with the operator that writes it, in graph order."""
    assert c.model is not None and c.plan is not None
    units = {unit.output.name: unit.name for unit in _units(c).values()}
    rows = []
    for node in c.model.graph:
        for value in node.outputs:
            if value.name in c.sqnr_db:
                name = units.get(value.name, node_label(node))
                decision = c.plan.nodes.get(name)
                rows.append(
                    {
                        "tensor": value.name,
                        "node": name,
                        "op": node.op_type if decision is None else decision.op,
                        "format": "float" if decision is None else decision.format,
                        "sqnr_db": c.sqnr_db[value.name],
                        "own_sqnr_db": c.own_db.get(value.name),
                    }
                )
    return rows
