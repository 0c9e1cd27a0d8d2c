"""What a report says, as plain data; report.json is this, report.html shows it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright import __version__
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.graph.model import consumers, node_label, static_shape
from bitwright.compiler.plan.model import NodeDecision, Plan
from bitwright.compiler.plan.units import Unit

SCHEMA = 1


def report_content(c: Compilation) -> dict[str, Any]:
    """Return the report of a finished compilation.

    Keys: ``schema``, ``bitwright``, ``model``, ``target``, ``summary``, ``phases``, ``layers``, ``noise``,
    ``sizes``, ``float``, ``not_lowered``, ``audit``, ``gate``, ``accuracy``, ``timing``, ``verification``,
    ``warnings``. Times are seconds, sizes bytes, errors decibel.
    """
    assert c.source is not None and c.model is not None and c.plan is not None and c.quantized is not None
    return {
        "schema": SCHEMA,
        "bitwright": __version__,
        "model": _model(c),
        "target": {
            "name": c.profile.name,
            "family": c.profile.family,
            "description": c.profile.description,
            "runtime": c.plan.runtime,
            "dims": dict(c.dims),
        },
        "summary": _summary(c, c.plan),
        "phases": [asdict(p) for p in c.phases],
        "layers": _layers(c, c.plan),
        "noise": _noise(c),
        "sizes": size_ledger(c.model, c.quantized),
        "float": [
            {"node": d.node, "op": d.op, "reason": d.reason}
            for d in c.plan.nodes.values()
            if d.format == "float" and d.op not in SILENT_OPERATORS
        ],
        "not_lowered": [] if c.lowering is None else [asdict(found) for found in c.lowering.not_lowered],
        "audit": None if c.audit is None else _audit(c),
        "gate": None if c.gate is None else _gate(c),
        "accuracy": None if c.accuracy is None else {**asdict(c.accuracy), "drop": c.accuracy.drop},
        "timing": {
            "onnxruntime": None if c.timing is None else asdict(c.timing),
            "artifact": _artifact_time(c),
        },
        "verification": None if c.verification is None else c.verification.to_dict(),
        "warnings": _warnings(c),
    }


def _artifact_time(c: Compilation) -> dict[str, float] | None:
    """Return the artifact's time against the float model in ONNX Runtime, where both ran on this machine."""
    if c.verification is None or c.verification.seconds is None or c.float_s is None:
        return None
    seconds = c.verification.seconds
    return {"seconds": seconds, "float_s": c.float_s, "ratio": seconds / c.float_s}


# Index arithmetic and constants: nobody asks why these are not quantized.
SILENT_OPERATORS = ("Constant", "Shape", "Cast", "Range", "ConstantOfShape", "Identity")


def _warnings(c: Compilation) -> list[str]:
    """Return what a reader must not overlook, each once."""
    random = ["calibrated on RANDOM data: ranges mean nothing"] if _random(c) else []
    data = () if c.dataset is None else c.dataset.warnings
    return list(dict.fromkeys((*random, *(c.source.warnings if c.source else ()), *data)))


def _random(c: Compilation) -> bool:
    return c.options.data is None and c.options.random_data


def _port(value: ir.Value) -> dict[str, Any]:
    shape = None if value.shape is None else [d if isinstance(d, int) else str(d) for d in value.shape.dims]
    return {
        "name": value.name,
        "dtype": None if value.dtype is None else value.dtype.name.lower(),
        "shape": shape,
    }


def _model(c: Compilation) -> dict[str, Any]:
    assert c.source is not None and c.model is not None
    initializers = c.model.graph.initializers.values()
    return {
        "file": c.source.path.name,
        "sha256": c.source.sha256,
        "nodes": len(list(c.source.model.graph)),
        "nodes_normalized": len(list(c.model.graph)),
        "parameters": sum(v.const_value.size for v in initializers if v.const_value is not None),
        "inputs": [_port(v) for v in c.model.graph.inputs],
        "outputs": [_port(v) for v in c.model.graph.outputs],
    }


def _summary(c: Compilation, plan: Plan) -> dict[str, Any]:
    anchors = [d for d in plan.nodes.values() if d.role == "anchor" and d.constant_weight]
    integer = [d for d in anchors if d.format != "float"]
    ledger = size_ledger(c.model, c.quantized)
    outputs = [] if c.model is None else [value.name or "" for value in c.model.graph.outputs]
    total = sum(d.macs for d in anchors)
    return {
        "integer_anchors": len(integer),
        "anchors": len(anchors),
        "integer_macs_share": sum(d.macs for d in integer) / total if total else 0.0,
        "macs": total,
        "float_bytes": _constant_bytes(c.normalized or c.model),
        "bytes": sum(row["bytes"] for row in ledger),
        "output_sqnr_db": {name: c.sqnr_db[name] for name in outputs if name in c.sqnr_db},
        "executed": "none" if c.verification is None else c.verification.executed,
        "speed": "modelled (profile's cost model)" if c.timing is None and c.float_s is None else "measured",
    }


def _constant_bytes(model: ir.Model | None) -> int:
    assert model is not None
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)


def _layers(c: Compilation, plan: Plan) -> list[dict[str, Any]]:
    """Return a row for every operator that the profile has a rule for, in graph order."""
    units = {unit.name: unit for unit in c.selection.units} if c.selection is not None else {}
    return [_layer(d, c, plan, units.get(d.node)) for d in plan.nodes.values() if d.role]


def _layer(decision: NodeDecision, c: Compilation, plan: Plan, unit: Unit | None) -> dict[str, Any]:
    """Return one row; the noise is that of what the operator and the nodes fused behind it write."""
    output = "" if unit is None else unit.output.name or ""
    reads = plan.activations.get(decision.inputs[0]) if decision.inputs else None
    writes = plan.activations.get(output)
    weight = plan.weights.get(decision.weight)
    return {
        **asdict(decision),
        "input_quant": None if reads is None else asdict(reads),
        "output_quant": None if writes is None else asdict(writes),
        "fused": [] if unit is None else [node_label(node) for node in unit.tail],
        "sqnr_db": c.sqnr_db.get(output),
        "measured_s": _measured(decision.node, c),
        "weight_scales": None if weight is None else int(weight.scale.size),
        "weight_scale_min": None if weight is None else float(weight.scale.min()),
        "weight_scale_max": None if weight is None else float(weight.scale.max()),
    }


def _measured(node: str, c: Compilation) -> float | None:
    """Return the best seconds of a node's integer kernels, where the artifact ran natively."""
    return None if c.verification is None else c.verification.step_seconds.get(node)


def _noise(c: Compilation) -> list[dict[str, Any]]:
    """Return the noise of every measured tensor, with the operator that writes it, in graph order."""
    assert c.model is not None and c.plan is not None
    units = {} if c.selection is None else {unit.output.name: unit.name for unit in c.selection.units}
    rows = []
    for node in c.model.graph:
        for value in node.outputs:
            if value.name in c.sqnr_db:
                name = units.get(value.name, node_label(node))
                decision = c.plan.nodes.get(name)
                row = {
                    "tensor": value.name,
                    "node": name,
                    "op": node.op_type if decision is None else decision.op,
                }
                kind = "float" if decision is None else decision.format
                rows.append({**row, "format": kind, "sqnr_db": c.sqnr_db[value.name]})
    return rows


def size_ledger(before: ir.Model | None, after: ir.Model | None) -> list[dict[str, Any]]:
    """Return a row per initializer of the quantized model: who reads it, its bytes, those of its values in float32."""
    assert before is not None and after is not None
    rows = []
    for name, value in after.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        quantized = name.endswith("_quantized")
        shape = static_shape(value) or tuple(tensor.shape.numpy())
        elements = int(np.prod(shape, dtype=np.int64))
        stem = name.removesuffix("_quantized").removesuffix("_corrected")
        added = stem != name.removesuffix("_quantized") and stem not in before.graph.initializers
        overhead = added or (not quantized and name not in before.graph.initializers)
        rows.append(
            {
                "initializer": name,
                "node": _reader(value),
                "dtype": tensor.dtype.name.lower(),
                "shape": list(shape),
                "bytes": int(tensor.nbytes),
                "float_bytes": 0 if overhead else elements * 4 if quantized else int(tensor.nbytes),
            }
        )
    return sorted(rows, key=lambda row: (-row["bytes"], row["initializer"]))


# A weight reaches its operator through these.
BETWEEN_WEIGHT_AND_READER = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Identity")


def _reader(value: ir.Value) -> str:
    """Return the first operator behind the quantizers that reads an initializer, "" if nothing does."""
    current = value
    while readers := consumers(current):
        node = min(readers, key=node_label)
        if node.op_type not in BETWEEN_WEIGHT_AND_READER or not node.outputs:
            return node_label(node)
        current = node.outputs[0]
    return ""


def _audit(c: Compilation) -> dict[str, Any]:
    assert c.audit is not None
    return {"operators": c.audit.operators, "findings": [asdict(f) for f in c.audit.findings]}


def _gate(c: Compilation) -> dict[str, Any]:
    assert c.gate is not None
    return {
        "all_float": c.gate.all_float,
        "ratio": c.gate.ratio,
        "keep_float": sorted(c.gate.keep_float),
        "trials": [asdict(t) for t in c.gate.trials],
    }
