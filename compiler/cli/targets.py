"""``targets``: the verbs about target profiles."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place

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


def schema_verb(out: Output) -> None:
    """Print the JSON Schema of a profile file, for editors."""
    from bitwright.targets import verbs

    out.document(verbs.json_schema())
