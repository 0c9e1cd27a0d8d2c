"""``sweep``: what a model could lose for what it could cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.cli.quantization import Quantization
from bitwright.compiler.errors import UsageError, nearest
from bitwright.compiler.options import Options
from bitwright.compiler.report.figures import seconds_text, size_text

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
) -> None:
    """Draw the Pareto front: the smallest loss for every cost, from the cheapest plan to float."""
    from bitwright.compiler.sweep import sweep_model

    if runtime not in RUNTIMES:
        msg = f"unknown runtime '{runtime}'"
        raise UsageError(msg, where="--runtime", fix=nearest(runtime, RUNTIMES))
    check_place(output / "front.csv", "--output")
    options = Options(model=model, target=target, output=output, **quantization.values())
    with TerminalProgress(out) as progress:
        front = sweep_model(options, cast("arg.RuntimeName", runtime), cost, points, progress)
    rows = [
        (
            f"point-{k:02d}",
            seconds_text(p.totals.latency_s),
            size_text(p.totals.weight_bytes),
            f"{p.totals.loss:.4g}",
        )
        for k, p in enumerate(front.points, start=1)
    ]
    rows += [
        (
            f"all {fmt}",
            seconds_text(p.totals.latency_s),
            size_text(p.totals.weight_bytes),
            f"{p.totals.loss:.4g}",
        )
        for fmt, p in front.uniform.items()
    ]
    out.table("Front", ("Plan", "Predicted time", "Constants", "Predicted loss"), rows)
    if out.json:
        out.document(
            {
                "files": front.files,
                "points": [{"formats": p.formats, "totals": vars(p.totals)} for p in front.points],
            }
        )
    else:
        for path in front.files:
            out.path(path)
