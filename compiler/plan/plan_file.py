"""plan.yaml: every decision, written for reading and for editing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from bitwright.compiler.plan.model import Plan

HEADER = """\
# Every decision, in graph order. This file can be edited and given back as --recipe:
#   nodes        'format' is what an operator runs in ('float' leaves it alone); entries without a role have no choice
#   activations  'low' and 'high' are the range; 'scale' and 'zero_point' follow from them and are not read
#   weights      for information: scales and integers are computed anew from the recipe
#   foldings     of circuits: how much of a layer is computed in one cycle; without the section they are chosen anew
"""


def plan_to_yaml(plan: Plan, recipe: Mapping[str, Any]) -> str:
    """Return the plan and the recipe it was made by as YAML text; floats keep their shortest exact form."""
    return plan_text(plan_to_dict(plan, recipe))


def plan_text(content: Mapping[str, Any]) -> str:
    """Return what :func:`plan_to_dict` gives as YAML text."""
    return HEADER + yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=False)


# Text that no version of YAML takes for a number, a date or a truth value.
_PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z_/][A-Za-z0-9_./-]*", re.IGNORECASE)


class _Dumper(yaml.SafeDumper):
    """Writes what every reader of YAML understands alike: quotes around odd names, ``1.0e-05`` for numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value out every time it occurs."""
        return True


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if _PLAIN.fullmatch(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    mantissa, _, exponent = repr(value).partition("e")
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    sign = "" if not exponent or exponent[0] in "+-" else "+"
    return dumper.represent_scalar(
        "tag:yaml.org,2002:float", f"{mantissa}e{sign}{exponent}" if exponent else mantissa
    )


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_text)


def plan_to_dict(plan: Plan, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan as plain data: nodes and tensors as lists, in graph order."""
    return {
        "target": plan.target,
        "runtime": plan.runtime,
        "recipe": dict(recipe),
        "nodes": [_compact(asdict(d)) for d in plan.nodes.values()],
        "activations": [_compact(asdict(a)) for a in plan.activations.values()],
        "weights": [
            {
                "tensor": w.tensor,
                "dtype": w.dtype,
                "axis": w.axis,
                **({"group": w.group} if w.group else {}),
                **({"codebook": w.codebook} if w.codebook else {}),
                "bits": w.bits,
                "scales": int(w.scale.size),
                "scale_min": float(w.scale.min()),
                "scale_max": float(w.scale.max()),
            }
            for w in plan.weights.values()
        ],
        **({"foldings": [{"layer": k, **v} for k, v in plan.foldings.items()]} if plan.foldings else {}),
    }


def _compact(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out empty fields and turn tuples into lists."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in record.items() if v not in ("", (), None)}
