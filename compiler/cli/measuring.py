"""``bench``: the verb that measures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output, plain
from bitwright.compiler.cli.parsing import check_place
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.errors import UsageError
from bitwright.compiler.report.figures import DASH, seconds_text

if TYPE_CHECKING:
    from bitwright.compiler.bench.comparison import BenchResult
    from bitwright.compiler.bench.roofline import Roofline


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        threads: Threads that compute.
        rounds: Turns of every process.
        sessions: Starts of every process.
    """

    threads: arg.ComputingThreads = 1
    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Turns of every process.")] = 10
    sessions: Annotated[
        int, typer.Option("--sessions", min=1, help="How often both processes are started anew.")
    ] = 3


@dataclass(frozen=True)
class Files:
    """What is written.

    Attributes:
        roofline: Picture of the kernels.
        output: The figures as JSON.
    """

    roofline: Annotated[
        Path | None,
        typer.Option(
            "--roofline",
            metavar="FILE.svg",
            help="Draw the kernels of bundle A under this machine's ceilings.",
        ),
    ] = None
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="Write the figures here, too.")
    ] = None

    def check(self, first: str) -> None:
        """Refuse what cannot be written before anything is measured."""
        if self.roofline is not None and not Path(first).is_dir():
            what, fix = (
                "only a bundle has kernels of ours",
                "give the output folder of 'bitwright compile' as A",
            )
            raise UsageError(what, where=f"--roofline {self.roofline}", fix=fix)
        _check_file(self.roofline, "--roofline", ".svg")
        _check_file(self.output, "--output", ".json")


def bench_verb(
    out: Output,
    first: Annotated[str, typer.Argument(metavar="A", help="An .onnx file or a bundle.", show_default=False)],
    effort: Effort,
    files: Files,
    second: Annotated[
        str | None, typer.Argument(metavar="B", help="The same as --against B.", show_default=False)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="fp32|int8|B",
            help="What A is compared with: an .onnx file or a bundle; for a bundle also int8, its Q/DQ model (the "
            "default), or fp32, the model it was compiled from.",
        ),
    ] = None,
    data: arg.Data = None,
) -> None:
    """Time two models, or a bundle's artifact against a model: separate processes that take turns."""
    from bitwright.compiler.bench.comparison import bench
    from bitwright.compiler.bench.roofline import measure_roofline

    if second is not None and against is not None:
        what = "the reference is named twice"
        raise UsageError(what, where=f"--against {against}", fix="give B or --against B")
    files.check(first)
    with TerminalProgress(out) as progress:
        under = (
            None
            if files.roofline is None
            else measure_roofline(first, threads=effort.threads, progress=progress)
        )
        found = bench(first, second or against, data=data, progress=progress, **vars(effort))
    _print_comparison(out, found)
    document = found.to_dict()
    if under is not None and files.roofline is not None:
        document["roofline"] = {**under.to_dict(), "picture": files.roofline}
        _print_kernels(out, under)
        _draw(under, files.roofline)
    _results(out, document, files, found.ratio.value)


def _draw(under: Roofline, path: Path) -> None:
    from bitwright.compiler.bench.roofline_picture import roofline_picture
    from bitwright.compiler.bundle.atomic import write_atomically

    write_atomically(path, roofline_picture([under]).encode())


def _check_file(path: Path | None, option: str, ending: str) -> None:
    """Refuse a place that cannot be written before anything is measured."""
    if path is None:
        return
    if path.suffix != ending or path.is_dir():
        what = f"the file's name must end in {ending}"
        raise UsageError(what, where=f"{option} {path}", fix=f"write {path.with_suffix(ending).name}")
    check_place(path, option)


def _print_comparison(out: Output, found: BenchResult) -> None:
    r = found.ratio
    rows = [
        (
            found.first,
            seconds_text(found.first_s),
            seconds_text(found.first_best_s),
            f"{r.value:.3f}",
            f"{r.low:.3f} to {r.high:.3f}",
        ),
        (found.second, seconds_text(found.second_s), seconds_text(found.second_best_s), "1", DASH),
    ]
    columns = ("Model", "#Median", "#Best", "#Ratio", "#95 % interval")
    threads = "one thread" if found.threads == 1 else f"{found.threads} threads"
    out.table(f"One call on {found.data}, {threads}", columns, rows)
    out.say(found.verdict())
    clock = f"{found.clock}; {found.sessions} x {found.rounds} rounds in turns, each model in its own process"
    for note in (clock, *found.notes):
        out.say(note, "dim")
    out.warn(found.warnings)


def _print_kernels(out: Output, found: Roofline) -> None:
    rows = [
        (
            k.name,
            k.intrinsic,
            seconds_text(k.seconds),
            f"{k.gops:.1f}",
            f"{k.intensity:.1f}",
            f"{k.share:.0%}",
            k.bound,
        )
        for k in found.kernels
    ]
    columns = ("Kernel", "Built on", "#Time", "#GOPS", "#Ops/byte", "#Ceiling", "Bound by")
    out.table(f"Kernels under the ceilings of {found.ceilings.machine}", columns, rows)
    for line in found.lines():
        out.say(line, "dim")


def _results(out: Output, document: dict[str, Any], files: Files, ratio: float) -> None:
    """Write and print what was found."""
    from bitwright.compiler.bundle.atomic import write_atomically

    if files.output is not None:
        text = json.dumps(document, indent=1, allow_nan=False, default=plain) + "\n"
        write_atomically(files.output, text.encode())
    if out.json:
        out.document(document)
        return
    out.text(f"{ratio:.4f}")
    for path in (files.roofline, files.output):
        if path is not None:
            out.path(path)
