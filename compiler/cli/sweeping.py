"""``sweep``: what a model could lose for what it could cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.cli.quantization import Quantization
from bitwright.compiler.errors import UsageError, nearest
from bitwright.compiler.options import Options
from bitwright.compiler.report.figures import seconds_text, size_text

if TYPE_CHECKING:
    from bitwright.compiler.allocate.frontier import FrontPoint

RUNTIMES = ("artifact", "onnxruntime")


def sweep_verb(
    out: Output,
    model: arg.Model,
    target: arg.Target,
    quantization: Quantization,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Folder for front.csv, front.svg and a recipe for every point."),
    ],
    cost: Annotated[
        str, typer.Option("--cost", help="What the loss is drawn against: latency, size, ram or energy.")
    ] = "latency",
    points: Annotated[int, typer.Option("--points", min=2, max=1000, help="Budgets to try.")] = 12,
    runtime: Annotated[
        str, typer.Option("--runtime", help="Plan for 'artifact' or for 'onnxruntime'.")
    ] = "artifact",
    measure: Annotated[
        bool, typer.Option(help="Build the points and compare them by what they really lose.")
    ] = True,
) -> None:
    """Draw the Pareto front: the smallest loss for every cost, from the cheapest plan to float."""
    from bitwright.compiler.sweep import sweep_model

    if runtime not in RUNTIMES:
        msg = f"unknown runtime '{runtime}'"
        raise UsageError(msg, where="--runtime", fix=nearest(runtime, RUNTIMES))
    check_place(output / "front.csv", "--output")
    options = Options(model=model, target=target, output=output, **quantization.values())
    with TerminalProgress(out) as progress:
        front = sweep_model(
            options, cast("arg.RuntimeName", runtime), cost, points, progress, measure=measure
        )
    rows = [_row(f"point-{k:02d}", p) for k, p in enumerate(front.points, start=1)]
    rows += [_row(f"all {fmt}", p) for fmt, p in front.uniform.items()]
    built = ("File", "Measured loss") if measure else ()
    out.table("Front", ("Plan", "Predicted time", "Constants", "Predicted loss", *built), rows)
    if out.json:
        points_found = [
            {
                "formats": p.formats,
                "totals": vars(p.totals),
                "measured": None if p.measured is None else vars(p.measured),
            }
            for p in front.points
        ]
        out.document({"files": front.files, "points": points_found})
    else:
        for path in front.files:
            out.path(path)


def _row(name: str, point: FrontPoint) -> tuple[str, ...]:
    totals = point.totals
    row = (name, seconds_text(totals.latency_s), size_text(totals.weight_bytes), f"{totals.loss:.4g}")
    if point.measured is None:
        return row
    return (*row, size_text(point.measured.file_bytes), f"{point.measured.loss:.4g}")
