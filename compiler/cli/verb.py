"""What every verb has in common: the options for printing, and a stdout that only results reach."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import is_dataclass
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_type_hints

import typer

from bitwright.compiler.cli.output import Output

PANEL = "Printing"
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout, nothing else.", rich_help_panel=PANEL),
]
Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", help="Print no tables, no progress.", rich_help_panel=PANEL)
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print more.", rich_help_panel=PANEL)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a bug.", rich_help_panel=PANEL)]
COMMON = {"json": Json, "quiet": Quiet, "verbose": Verbose, "debug": Debug}

Verb = Callable[..., None]


def verb(app: typer.Typer, name: str, panel: str | None = None) -> Callable[[Verb], Verb]:
    """Return a decorator that registers a function as a verb, shown under the panel's name.

    The function's first parameter, ``out``, is the :class:`Output` of this run; the others are its arguments and
    options; a parameter that is a dataclass stands for its fields, so that verbs can share a list of options. The
    printing options are added to every verb.
    """

    def register(function: Verb) -> Verb:
        app.command(name, rich_help_panel=panel)(_with_common_options(function))
        return function

    return register


def _options(group: Any) -> list[Parameter]:
    """Return the parameters of a dataclass of options."""
    return list(signature(group).parameters.values())


def _with_common_options(function: Verb) -> Verb:
    hints = get_type_hints(function, include_extras=True)
    given = [p for p in signature(function).parameters.values() if p.name != "out"]
    groups = {p.name: hints[p.name] for p in given if is_dataclass(hints[p.name])}
    own = [q for p in given for q in (_options(groups[p.name]) if p.name in groups else [p])]
    hints |= {
        k: v for group in groups.values() for k, v in get_type_hints(group, include_extras=True).items()
    }

    def run(**values: Any) -> None:
        out: Output = values.pop("invocation").find_root().obj
        out.json, out.quiet = values.pop("json"), values.pop("quiet")
        out.verbose, out.debug = values.pop("verbose"), values.pop("debug")
        for name, group in groups.items():
            values[name] = group(**{p.name: values.pop(p.name) for p in _options(group)})
        # A user's script may print; stdout belongs to results.
        with redirect_stdout(sys.stderr):
            function(out, **values)

    kind = Parameter.KEYWORD_ONLY
    parameters = [
        Parameter("invocation", kind, annotation=typer.Context),
        *(p.replace(kind=kind, annotation=hints[p.name]) for p in own),
        *(Parameter(key, kind, annotation=hint, default=False) for key, hint in COMMON.items()),
    ]
    run.__doc__, run.__name__ = function.__doc__, function.__name__
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return run
