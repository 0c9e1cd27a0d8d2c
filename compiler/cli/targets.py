"""``targets``: the verbs about target profiles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place, parse_dims
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.report.figures import DASH, seconds_text

if TYPE_CHECKING:
    from bitwright.compiler.probing.probe import ProbeResult

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="A target's name or a profile's .yaml file.", show_default=False)
]


def list_verb(out: Output) -> None:
    """List the targets."""
    from bitwright.targets.loader import list_profiles

    found = list_profiles()
    if out.json:
        out.document({"targets": [asdict(p) for p in found]})
        return
    out.table("", ("Name", "Family", "Description"), [(p.name, p.family, p.description) for p in found])
    if out.quiet:
        for profile in found:
            out.text(profile.name)


def show_verb(out: Output, name: Name) -> None:
    """Print a profile with everything it extends written out."""
    from bitwright.targets import verbs
    from bitwright.targets.loader import load_profile

    if out.json:
        out.document(load_profile(name).dump())
    else:
        out.text(verbs.show(name).rstrip("\n"))


def check_verb(
    out: Output,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A profile's .yaml file.", show_default=False)],
) -> None:
    """Check a profile and list every broken rule."""
    from bitwright.targets import verbs

    findings = verbs.check(file)
    if out.json:
        out.document({"file": file, "findings": [asdict(f) for f in findings]})
    elif not findings:
        out.say(f"{file}: no findings")
    for finding in findings if not out.json else ():
        out.error(finding.error())
    if findings:
        raise typer.Exit(2)


def new_verb(
    out: Output,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the new profile.", show_default=False)],
    like: Annotated[str, typer.Option("--like", help="The shipped profile it starts from.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file to write; NAME.yaml unless named.")
    ] = None,
) -> None:
    """Start a profile of your own from a shipped one."""
    from bitwright.targets import verbs

    path = output or Path(f"{name}.yaml")
    check_place(path, "--output")
    verbs.new(name, like, path)
    if out.json:
        out.document({"profile": path})
    else:
        out.path(path)


def probe_verb(
    out: Output,
    name: Name,
    runtime: Annotated[str, typer.Option("--runtime", help="onnxruntime, or artifact.")] = "onnxruntime",
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="MODEL", help="Measure this model's operators, each in every format."
        ),
    ] = None,
    data: arg.Data = None,
    dim: arg.Dims = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write; NAME-measured.yaml unless named."),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=0.1, help="About how long to measure, building not included.")
    ] = 60.0,
    threads: arg.ComputingThreads = 1,
) -> None:
    """Measure what operators take on this machine, or what circuits take of an FPGA, and write it down."""
    from bitwright.compiler.probing.probe import is_circuit, probe, probe_circuits

    if output is not None:
        check_place(output, "--output")
    if is_circuit(name):
        with TerminalProgress(out, name) as progress:
            path, notes = probe_circuits(name, output=output, progress=progress)
        _print_costs(out, path, notes)
        return
    with TerminalProgress(out, name) as progress:
        found = probe(
            name,
            runtime=runtime,
            model=model,
            data=data,
            dims=parse_dims(dim or ()),
            output=output,
            seconds=seconds,
            threads=threads,
            progress=progress,
        )
    if out.json:
        out.document({k: v for k, v in asdict(found).items() if k not in ("profile", "times")})
        return
    _print_probe(out, found)
    for note in found.notes:
        out.say(note)
    out.path(found.path)


def _print_costs(out: Output, path: Path, notes: tuple[str, ...]) -> None:
    """Print where a cost table was written."""
    if out.json:
        out.document({"path": path, "notes": notes})
        return
    for note in notes:
        out.say(note)
    out.path(path)


def _print_probe(out: Output, found: ProbeResult) -> None:
    """Print what was measured: a model's placements and what the profile says of them now, else what was fitted."""
    title = f"{found.calls} calls measured"
    if found.predicted or out.verbose:
        rows = [
            (label, seconds_text(s), _prediction(found.predicted.get(label), s))
            for label, s in found.measured.items()
        ]
        out.table(title, ("Placement", "Measured", "Predicted"), rows)
    if not found.predicted:
        fits = [
            (work, fmt, str(fit.points), f"{fit.error:.0%}")
            for work, formats in found.times.fits.items()
            for fmt, fit in formats.items()
        ]
        out.table(title, ("Work", "Format", "Calls", "Median error of the fit"), fits)


def _prediction(seconds: float | None, measured: float) -> str:
    """Return a prediction with its relative error."""
    if seconds is None:
        return DASH
    return f"{seconds_text(seconds)} ({seconds / measured - 1:+.0%})"


def schema_verb(out: Output) -> None:
    """Print the JSON Schema of a profile file, for editors."""
    from bitwright.targets import verbs

    out.document(verbs.json_schema())
