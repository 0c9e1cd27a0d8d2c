"""What would help most: for the worst layers, what their rounding costs the outputs and the change that takes it back."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.ort.what_if import WhatIf
from bitwright.compiler.plan.model import NodeDecision, Plan
from bitwright.compiler.plan.plan_file import plan_to_yaml
from bitwright.compiler.plan.plan_patch import PlanText
from bitwright.compiler.plan.support import why_weight_unfit
from bitwright.compiler.plan.units import Unit
from bitwright.compiler.report.figures import gain_text
from bitwright.compiler.report.formats import DYNAMIC

FLOAT = "float"
# Less than this cannot be told from the noise of a few samples.
WORTHWHILE_DB = 0.1
# One part is to blame alone if taking it back gains so many times what the other gains.
CLEARLY = 2.0
# Formats that round the same part less, the smallest step first.
FINER_WEIGHTS = {
    "binary": ("ternary", "w2", "w4", "w8"),
    "ternary": ("w4", "nf4", "w8"),
    "w2": ("w4", "nf4", "w8"),
    "nf4": ("w8",),
    "w4": ("w8",),
    "w8": ("fp16-weights",),
    "w4a8": ("int8", "w4", "w8"),
    "int8": ("w8", "fp16-weights"),
    "int8-dynamic": ("w8", "fp16-weights"),
    "int8-row": ("w8", "fp16-weights"),
    "fp8": ("w8", "fp16-weights"),
}
# Where both are to blame: 8 bits in groups, or halves, and inputs that are not rounded as a whole.
FINER_BOTH = dict.fromkeys(("w4a8", "int8", "int8-dynamic", "int8-row", "fp8"), ("w8", "fp16-weights"))
FINER_INPUTS = {
    "w4a8": ("w4", "w8"),
    "int8": ("w8a16", "int8-row", "w8"),
    "int8-dynamic": ("int8-row", "w8"),
    "int8-row": ("w8",),
    "fp8": ("w8a16", "w8"),
}


def advice_rows(c: Compilation, plan: Plan) -> list[dict[str, Any]]:
    """Return what is known and advised about each of the worst layers, the most expensive first.

    ``gain_db``, ``inputs_db`` and ``weights_db`` were measured by running the model with the layer's rounding, or
    only that of its inputs or weights, taken back. ``patch`` is None where no change would be worth it.
    """
    if not c.advice or c.selection is None:
        return []
    units = {unit.name: unit for unit in c.selection.units}
    text = PlanText.read(plan_to_yaml(plan, c.recipe.as_plain()), plan_name(c))
    return [_row(c, found, plan.nodes[found.node], units[found.node], text) for found in c.advice]


def plan_name(c: Compilation) -> str:
    """Return the name of the plan's file, which a patch applies to."""
    if c.plan is None or c.plan.runtime == "artifact" or c.options.output is None:
        return "plan.yaml"
    return f"{c.options.output.name.removesuffix('.onnx')}.plan.yaml"


def _row(
    c: Compilation, found: WhatIf, decision: NodeDecision, unit: Unit, text: PlanText
) -> dict[str, Any]:
    blame = blamed(found, decision.format)
    change = None if blame == "nothing" else _better(c, decision.format, unit, blame)
    return {
        "node": decision.node,
        "op": decision.op,
        "format": decision.format,
        "own_sqnr_db": c.own_db.get(unit.output.name or ""),
        "gain_db": found.gain_db,
        "inputs_db": found.inputs_db,
        "weights_db": found.weights_db,
        "blame": blame,
        "change": change,
        "text": _sentence(found, decision, blame, change),
        "patch": None if change is None else text.patch(decision.node, change),
        "command": None if change is None else command(c),
    }


def blamed(found: WhatIf, fmt: str) -> str:
    """Return which rounding costs the outputs: ``weights``, ``inputs``, ``both`` or ``nothing``."""
    if found.gain_db < WORTHWHILE_DB:
        return "nothing"
    if found.inputs_db is None or found.weights_db is None:
        return "both" if fmt in DYNAMIC else "weights"
    inputs, weights = max(found.inputs_db, 0.0), max(found.weights_db, 0.0)
    if weights > CLEARLY * inputs:
        return "weights"
    return "inputs" if inputs > CLEARLY * weights else "both"


def _better(c: Compilation, fmt: str, unit: Unit, blame: str) -> str:
    """Return the next format that rounds the part to blame less and that the target has for the operator."""
    ladder = {"weights": FINER_WEIGHTS, "inputs": FINER_INPUTS, "both": FINER_BOTH}[blame].get(fmt, ())
    return next((name for name in ladder if _runs(c, name, unit)), FLOAT)


def _runs(c: Compilation, fmt: str, unit: Unit) -> bool:
    combo = None if unit.rule is None else unit.rule.combo_for((fmt,))
    if combo is None or combo.weight is None:
        return False
    return why_weight_unfit(unit.head, c.profile.qspace(combo.weight)) is None


def _sentence(found: WhatIf, decision: NodeDecision, blame: str, change: str | None) -> str:
    gain = gain_text(found.gain_db)
    if change is None:
        return (
            f"Leave it: computed in float it would move the outputs by {gain}. "
            "What it rounds does not show behind the layers that follow."
        )
    rounding = {
        "weights": "the rounding of its weights is to blame",
        "inputs": "the rounding of its inputs is to blame",
        "both": "inputs and weights share the blame",
    }[blame]
    head = f"In float the outputs would gain {gain}; {rounding}"
    if change == FLOAT:
        return f"{head}. Keep it in float{_price(decision)}."
    part = {"weights": found.weights_db, "inputs": found.inputs_db}.get(blame)
    alone = "" if part is None else f" ({gain_text(part)} without it)"
    return f"{head}{alone}. Move it from {decision.format} to {change} for most of that."


def _price(decision: NodeDecision) -> str:
    """Return what float costs, as far as the cost model knows."""
    if not decision.estimated_s or not decision.estimated_float_s:
        return ""
    ratio = decision.estimated_float_s / decision.estimated_s
    return f", at an estimated {ratio:.1f} times its time"


def command(c: Compilation, plan: str = "better.plan.yaml") -> str:
    """Return the command line that quantizes the model by a plan, with the options that no plan holds.

    Data that was passed in memory has no name; DATA stands for it.
    """
    assert c.plan is not None
    verb = "compile" if c.plan.runtime == "artifact" else "quantize"
    return shlex.join(["bitwright", verb, str(c.options.model), *_options(c), "--recipe", plan, *_output(c)])


def _output(c: Compilation) -> list[str]:
    assert c.plan is not None
    return ["-o", "better"] if c.plan.runtime == "artifact" else []


def _options(c: Compilation) -> Iterator[str]:
    asked = c.options
    yield from ("-t", asked.target)
    if asked.data is None and asked.random_data:
        yield "--random-data"
    else:
        yield from ("-d", asked.data if isinstance(asked.data, str) else "DATA")
    if asked.samples is not None:
        yield from ("--samples", str(asked.samples))
    for name, size in asked.dims.items():
        yield from ("--dim", f"{name}={size}")
    if asked.group is not None:
        yield from ("--group", str(asked.group))
    if asked.evaluate is not None:
        yield from ("--eval", asked.evaluate)
    if c.plan is not None and c.plan.runtime == "onnxruntime" and not asked.gate:
        yield "--no-gate"
