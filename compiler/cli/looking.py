"""``inspect``, ``report``, ``verify``: the verbs that look."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import parse_dims
from bitwright.compiler.errors import UsageError, nearest

RUNTIMES = ("artifact", "onnxruntime")


def inspect_verb(
    out: Output,
    model: arg.Model,
    target: arg.Target,
    dim: arg.Dims = None,
    runtime: Annotated[
        str, typer.Option("--runtime", help="Plan for 'artifact' or for 'onnxruntime'.")
    ] = "artifact",
    keep_float: arg.KeepFloat = None,
) -> None:
    """Show what a target would do with a model: coverage, costs, sizes. Needs no data."""
    from bitwright.compiler.cli.tables import print_inspection
    from bitwright.compiler.inspect import inspect_model

    if runtime not in RUNTIMES:
        msg = f"unknown runtime '{runtime}'"
        raise UsageError(msg, where="--runtime", fix=nearest(runtime, RUNTIMES))
    chosen = cast(Literal["artifact", "onnxruntime"], runtime)
    found = inspect_model(
        model, target, dims=parse_dims(dim or ()), runtime=chosen, keep_float=frozenset(keep_float or ())
    )
    print_inspection(out, found)
    if out.json:
        out.document(found.to_dict())


def report_verb(out: Output, bundle: arg.Result) -> None:
    """Print the summary of a report and the path of its page."""
    from bitwright.compiler.cli.tables import print_report
    from bitwright.compiler.report.written import open_written

    opened = open_written(bundle)
    print_report(out, opened.report, layers=True)
    if out.json:
        out.document(opened.report)
    else:
        out.path(opened.page or opened.place)


def verify_verb(
    out: Output,
    bundle: arg.Bundle,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Use only the first golden sets.")
    ] = None,
) -> None:
    """Execute an artifact and compare every integer kernel with the reference, bit for bit."""
    from bitwright.compiler.bundle.verify import verify

    found = verify(bundle, samples=samples)
    if out.json and found.passed:
        out.document({"bundle": bundle, "verification": found.to_dict()})
    found.check()
    if found.executed == "none":
        out.warn(found.lines())
    for line in found.lines() if found.executed != "none" else ():
        out.say(line)
