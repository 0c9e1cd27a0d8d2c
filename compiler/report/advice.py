"""What would help most: what the rounding of the worst layers costs the outputs, and the change that takes it back."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

from bitwright.compiler.compilation import Change, Compilation
from bitwright.compiler.ort.what_if import WORTHWHILE_DB, WhatIf
from bitwright.compiler.plan.model import NodeDecision, Plan
from bitwright.compiler.plan.plan_file import plan_to_yaml
from bitwright.compiler.plan.plan_patch import PlanText
from bitwright.compiler.plan.units import Unit
from bitwright.compiler.report.figures import gain_text
from bitwright.compiler.report.formats import DYNAMIC

FLOAT = "float"
# One part is to blame alone if taking it back gains so many times what the other gains.
CLEARLY = 2.0
# If every part gains less than this share of the whole (one in four), none is to blame alone.
ALONE = 4.0


def advice_rows(c: Compilation, plan: Plan) -> list[dict[str, Any]]:
    """Return what is known and advised about each of the worst layers, the most expensive first.

    ``gain_db``, ``inputs_db``, ``weights_db`` and ``output_db`` were measured by running the model with the layer's
    rounding, or only that of its inputs, weights or output, taken back; ``change_db`` with the advised format instead.
    ``patch`` is None where no change would be worth it.
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


def _row(c: Compilation, found: WhatIf, decision: NodeDecision, unit: Unit, text: PlanText) -> dict[str, Any]:
    blame = blamed(found, decision.format)
    change = c.changes.get(decision.node)
    if blame == "nothing" or (change is not None and change.gain_db < WORTHWHILE_DB):
        change = None
    return {
        "node": decision.node,
        "op": decision.op,
        "format": decision.format,
        "own_sqnr_db": c.own_db.get(unit.output.name or ""),
        "gain_db": found.gain_db,
        "inputs_db": found.inputs_db,
        "weights_db": found.weights_db,
        "output_db": found.output_db,
        "blame": blame,
        "change": None if change is None else change.format,
        "change_db": None if change is None else change.gain_db,
        "text": _sentence(found, decision, blame, change),
        "patch": None if change is None else text.patch(decision.node, change.format),
        "command": None if change is None else command(c),
    }


def blamed(found: WhatIf, fmt: str) -> str:
    """Return which rounding costs the outputs: ``weights``, ``inputs``, ``both``, ``output`` or ``nothing``."""
    if found.gain_db < WORTHWHILE_DB:
        return "nothing"
    if found.inputs_db is None or found.weights_db is None:
        return "both" if fmt in DYNAMIC else "weights"
    inputs, weights, output = (
        max(x or 0.0, 0.0) for x in (found.inputs_db, found.weights_db, found.output_db)
    )
    if max(inputs, weights, output) * ALONE < found.gain_db:
        return "both"
    if output > CLEARLY * max(inputs, weights):
        return "output"
    if weights > CLEARLY * inputs:
        return "weights"
    return "inputs" if inputs > CLEARLY * weights else "both"


def _sentence(found: WhatIf, decision: NodeDecision, blame: str, change: Change | None) -> str:
    gain = gain_text(found.gain_db)
    if blame == "nothing":
        return (
            f"Leave it: computed in float it would move the outputs by {gain}. "
            "What it rounds does not show behind the layers that follow."
        )
    if change is None:
        return f"Leave it: the outputs would gain {gain} in float, too little to matter."
    parts = "inputs and weights" if found.output_db is None else "inputs, weights and output"
    rounding = {
        "weights": "the rounding of its weights is to blame",
        "inputs": "the rounding of its inputs is to blame",
        "both": f"its {parts} share the blame",
        "output": "the rounding of its output is to blame, which its kernel wants and no layer reads as integers",
    }[blame]
    head = f"In float the outputs would gain {gain}; {rounding}"
    if change.format == FLOAT:
        return f"{head}. Keep it in float{_price(decision)}."
    there = gain_text(change.gain_db)
    return f"{head}. Moved from {decision.format} to {change.format} they would gain {there} already."


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
    for name, sizes in asked.buckets.items():
        yield from ("--bucket", f"{name}={','.join(map(str, sizes))}")
    for name, value in asked.pad.items():
        yield from ("--pad", f"{name}={value:g}")
    if asked.loop is not None:
        yield from ("--loop", asked.loop)
    if asked.dynamic is not None:
        yield from ("--dynamic", asked.dynamic)
    if asked.static is not None:
        yield from ("--static", asked.static)
    if asked.group is not None:
        yield from ("--group", str(asked.group))
    if asked.evaluate is not None:
        yield from ("--eval", asked.evaluate)
    if c.plan is not None and c.plan.runtime == "onnxruntime" and not asked.gate:
        yield "--no-gate"
