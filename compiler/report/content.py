"""What a report says, as plain data; report.json is this, report.html shows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import onnx_ir as ir

from bitwright import __version__
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.report.advice import advice_rows
from bitwright.compiler.report.decisions import allocation_section, migration_section, recipe_section
from bitwright.compiler.report.deployment import deployment_section
from bitwright.compiler.report.formats import DYNAMIC
from bitwright.compiler.report.generated import generated_section
from bitwright.compiler.report.layers import layer_rows, noise_rows, parameters_by_bits
from bitwright.compiler.report.sizes import constant_bytes, size_ledger

SCHEMA = 1


def report_content(c: Compilation) -> dict[str, Any]:
    """Return the report of a finished compilation.

    Keys: ``schema``, ``bitwright``, ``model``, ``target``, ``summary``, ``recipe``, ``phases``, ``migrations``,
    ``allocation``, ``layers``, ``noise``, ``advice``, ``sizes``, ``float``, ``not_lowered``, ``audit``, ``gate``,
    ``accuracy``, ``timing``, ``tuning``, ``deployment``, ``generated``, ``verification``,
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
        "recipe": recipe_section(c),
        "phases": [asdict(p) for p in c.phases],
        "migrations": migration_section(c),
        "allocation": allocation_section(c),
        "layers": layer_rows(c, c.plan),
        "noise": noise_rows(c),
        "advice": advice_rows(c, c.plan),
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
        "tuning": None if c.tuning is None else c.tuning.as_plain(),
        "deployment": deployment_section(c),
        "generated": generated_section(c),
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


def port(value: ir.Value) -> dict[str, Any]:
    """Return name, type and shape of an input or output."""
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
        "inputs": [port(v) for v in c.model.graph.inputs],
        "outputs": [port(v) for v in c.model.graph.outputs],
    }


def _summary(c: Compilation, plan: Plan) -> dict[str, Any]:
    anchors = [d for d in plan.nodes.values() if d.role == "anchor" and d.constant_weight]
    rows = layer_rows(c, plan)
    weighted = [r for r in rows if r["parameters"] and r["role"] in ("anchor", "table")]
    quantized = [d for d in anchors if d.format != "float"]
    integer = [d for d in quantized if d.integer or d.format in DYNAMIC]
    ledger = size_ledger(c.model, c.quantized)
    outputs = [] if c.model is None else [value.name or "" for value in c.model.graph.outputs]
    total = sum(d.macs for d in anchors)
    return {
        "integer_anchors": len(integer),
        "quantized_anchors": len(quantized),
        "anchors": len(anchors),
        "integer_macs_share": sum(d.macs for d in integer) / total if total else 0.0,
        "quantized_macs_share": sum(d.macs for d in quantized) / total if total else 0.0,
        "macs": total,
        "formats": dict(Counter(r["format"] for r in weighted).most_common()),
        "parameters_by_bits": parameters_by_bits(c, plan),
        "float_bytes": constant_bytes(c.normalized or c.model),
        "bytes": sum(row["bytes"] for row in ledger),
        "output_sqnr_db": {name: c.sqnr_db[name] for name in outputs if name in c.sqnr_db},
        "executed": "none" if c.verification is None else c.verification.executed,
        "speed": "modelled (profile's cost model)" if c.timing is None and c.float_s is None else "measured",
    }


def _audit(c: Compilation) -> dict[str, Any]:
    assert c.audit is not None
    return {
        "operators": c.audit.operators,
        "findings": [asdict(f) for f in c.audit.findings],
        "patterns": [asdict(p) for p in c.audit.patterns],
    }


def _gate(c: Compilation) -> dict[str, Any]:
    assert c.gate is not None
    return {
        "all_float": c.gate.all_float,
        "ratio": c.gate.ratio,
        "keep_float": sorted(c.gate.keep_float),
        "trials": [asdict(t) for t in c.gate.trials],
    }
