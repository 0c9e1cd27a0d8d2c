"""``explain``: one node's decision and errors, or what would help most; and the plan that follows the advice."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place
from bitwright.compiler.errors import UsageError
from bitwright.compiler.report.figures import (
    count_text,
    decibel_text,
    gain_text,
    number_text,
    seconds_text,
    size_text,
)
from bitwright.compiler.report.formats import weight_text

if TYPE_CHECKING:
    from bitwright.compiler.report.written import Written

Facts = list[tuple[str, str]]
# Layers that are listed where nothing says what each of them costs the outputs.
WORST = 5


def explain_verb(
    out: Output,
    result: arg.Result,
    node: Annotated[
        str | None,
        typer.Argument(
            metavar="NODE", help="A node's name; without it, the layers that cost most.", show_default=False
        ),
    ] = None,
    apply: Annotated[
        Path | None,
        typer.Option(
            "--apply",
            metavar="FILE",
            help="Write the plan with the advised formats, to be given to --recipe.",
        ),
    ] = None,
) -> None:
    """Say why a node runs in its format, what error it adds, and which change of the plan would help most."""
    from bitwright.compiler.report.explain import explain
    from bitwright.compiler.report.written import open_written

    opened = open_written(result)
    row = None if node is None else explain(opened.report, node)
    if apply is not None:
        _apply(opened, node, apply)
    if out.json:
        advice = {"advice": opened.report["advice"]}
        out.document({**(advice if row is None else row), **({} if apply is None else {"plan": apply})})
        return
    if row is None:
        _print_worst(out, opened)
    else:
        out.facts(f"{row['node']} ({row['op']}): {row['format']}", _explanation(row))
        _print_patch(out, row["advice"])
    if apply is not None:
        out.path(apply)


def _apply(opened: Written, node: str | None, place: Path) -> None:
    """Write the plan with the advised formats to a file of its own.

    Raises:
        UsageError: There is no plan or no advice, or the file would replace the plan that the result was made by.
    """
    from bitwright.compiler.bundle.atomic import write_atomically
    from bitwright.compiler.plan.plan_patch import PlanText
    from bitwright.compiler.report.explain import changes

    check_place(place, "--apply")
    if place.is_dir():
        what = "is a folder"
        raise UsageError(what, where=f"--apply {place}", fix="name a file")
    if opened.plan_text is None:
        what = "the plan is not there any more"
        raise UsageError(what, where=str(opened.plan), fix="quantize the model again")
    if place.exists() and opened.plan.exists() and place.samefile(opened.plan):
        what = "would replace the plan that the result was made by"
        raise UsageError(what, where=f"--apply {place}", fix="name another file")
    plan = PlanText.read(opened.plan_text, str(opened.plan))
    write_atomically(place, plan.with_formats(changes(opened.report, node)).encode())


def _print_worst(out: Output, opened: Written) -> None:
    """Print the advice about the worst layers, each with its patch."""
    advice = opened.report["advice"]
    if "streaming" in opened.report:
        _print_streamed(out, opened.report)
    elif not advice:
        out.say(
            "no layer's rounding was measured alone: nothing is quantized, or nothing could be taken back"
        )
    for row in advice:
        facts = [("Own SQNR", decibel_text(row["own_sqnr_db"])), *_advice(row)]
        out.facts(f"{row['node']} ({row['op']}): {row['format']}", facts)
        _print_patch(out, row)
    command = next((row["command"] for row in advice if row["command"]), None)
    if command is not None:
        out.say("To follow the advice, write the changed plan and quantize by it:")
        result = opened.place.parent if opened.page is not None else _model(opened)
        out.line(f"  {shlex.join(['bitwright', 'explain', str(result), '--apply', 'better.plan.yaml'])}")
        out.line(f"  {command}")


def _print_streamed(out: Output, report: Mapping[str, Any]) -> None:
    """Print the layers of largest own error; what they cost the outputs is not measured part by part."""
    rows = [row for row in report["layers"] if row["own_sqnr_db"] is not None]
    worst = sorted(rows, key=lambda row: row["own_sqnr_db"])[:WORST]
    facts = [
        (row["node"], f"{row['format']}, own {decibel_text(row['own_sqnr_db'])}, {_accumulated(row)}")
        for row in worst
    ]
    out.facts("Quantized part by part; the layers that add most noise", facts)


def _accumulated(row: Mapping[str, Any]) -> str:
    """Return the noise that has come together at a layer's output."""
    return f"accumulated {decibel_text(row['sqnr_db'])}" if row["sqnr_db"] is not None else "not compared"


def _model(opened: Written) -> Path:
    return opened.place.with_name(opened.place.name.removesuffix(".report.json") + ".onnx")


def _print_patch(out: Output, advice: dict[str, Any] | None) -> None:
    for line in advice["patch"].splitlines() if advice is not None and advice["patch"] else ():
        out.line(f"  {line}", "green" if line.startswith("+") else "red" if line.startswith("-") else "dim")


def _advice(row: dict[str, Any]) -> Facts:
    found = [("In float", f"{gain_text(row['gain_db'])} at the outputs")]
    for key, label in (("inputs_db", "inputs"), ("weights_db", "weights"), ("output_db", "output")):
        if row[key] is not None:
            found.append((f"Exact {label}", f"{gain_text(row[key])} at the outputs"))
    return [*found, ("Advice", row["text"])]


def _explanation(row: dict[str, Any]) -> Facts:
    found = [("Why", row["reason"])]
    if row["asked"] != row["node"]:
        found.append(("Asked for", f"{row['asked']}, which is fused behind {row['node']}"))
    if row.get("fused"):
        found.append(("Fused behind it", ", ".join(row["fused"])))
    for key, label in (("input_quant", "Reads"), ("output_quant", "Writes")):
        if row.get(key):
            found.append((label, _quantizer(row[key])))
    found += _weight(row)
    for key, label in (("own_sqnr_db", "Own SQNR"), ("sqnr_db", "Accumulated SQNR")):
        if row.get(key) is not None:
            found.append((label, decibel_text(row[key])))
    return [
        *found,
        *_cost(row),
        *(("ONNX Runtime", f"{f['kind']}: {f['why']}") for f in row["findings"]),
        *(_advice(row["advice"]) if row["advice"] is not None else ()),
    ]


def _weight(row: dict[str, Any]) -> Facts:
    if row.get("weight_quant") is None:
        return []
    span = ""
    if row["weight_scales"]:
        span = f", {number_text(row['weight_scale_min'])} to {number_text(row['weight_scale_max'])}"
    return [("Weight", f"{row['weight']}: {weight_text(row['weight_quant'])}{span}")]


def _cost(row: dict[str, Any]) -> Facts:
    found = [("MACs", count_text(row["macs"]))] if row.get("macs") else []
    if row.get("estimated_s"):
        times = (
            f"{seconds_text(row['estimated_s'])} estimated, {seconds_text(row['estimated_float_s'])} in float"
        )
        found.append(("Time", times))
    if row["bytes"]:
        found.append(("Constants", f"{size_text(row['bytes'])}, {size_text(row['float_bytes'])} in float"))
    return found


def _quantizer(quant: dict[str, Any]) -> str:
    span = f"[{number_text(quant['low'])}, {number_text(quant['high'])}] by {quant['method']}"
    tie = f", one scale with {quant['tie']}" if quant["tie"] and quant["tie"] != quant["tensor"] else ""
    scale = f"scale {number_text(quant['scale'])}, zero point {quant['zero_point']}"
    return f"{quant['tensor']}: {quant['dtype']}, {scale}, {span}{tie}"
