"""plan.yaml: every decision, written for reading and for editing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml

from bitwright.compiler.plan.model import Plan


def plan_to_yaml(plan: Plan) -> str:
    """Return the plan as YAML text; floats keep their shortest exact form."""
    return yaml.safe_dump(plan_to_dict(plan), sort_keys=False, width=120, allow_unicode=False)


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data: nodes and tensors as lists, in graph order."""
    return {
        "target": plan.target,
        "runtime": plan.runtime,
        "nodes": [_compact(asdict(d)) for d in plan.nodes.values()],
        "activations": [_compact(asdict(a)) for a in plan.activations.values()],
        "weights": [
            {
                "tensor": w.tensor,
                "dtype": w.dtype,
                "axis": w.axis,
                "scales": int(w.scale.size),
                "scale_min": float(w.scale.min()),
                "scale_max": float(w.scale.max()),
            }
            for w in plan.weights.values()
        ],
    }


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out empty fields and turn tuples into lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in record.items() if v not in ("", (), None)}
