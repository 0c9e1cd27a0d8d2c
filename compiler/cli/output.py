"""What is printed where: tables and messages for people on stderr, artifact paths or one JSON document on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bitwright.compiler.errors import BitwrightError, printable
from bitwright.targets.schema import SHORT_FORMATS


@dataclass
class Output:
    """Where one run of the command line prints.

    Attributes:
        json: Print one JSON document on stdout and nothing for people.
        quiet: Leave out tables and progress; warnings and errors stay.
        verbose: Print what every phase noted.
        debug: Show the traceback of a bug.
        stdout: The stream of results; everything else that writes to ``sys.stdout`` is sent to stderr.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)

    @property
    def console(self) -> Console:
        """Console for people; names from a model are never read as markup."""
        return Console(stderr=True, markup=False, highlight=False, emoji=False)

    @property
    def speaks(self) -> bool:
        """Whether people read along."""
        return not (self.json or self.quiet)

    def document(self, value: Any) -> None:
        """Print the JSON document."""
        self.text(json.dumps(value, indent=2, allow_nan=False, default=plain))

    def text(self, text: str) -> None:
        """Print a result on stdout."""
        print(text, file=self.stdout)

    def path(self, path: Path) -> None:
        """Print the path of something that was made."""
        self.text(str(path))

    def say(self, line: str, style: str = "") -> None:
        """Print a line for people."""
        if self.speaks:
            self.console.print(Text(printable(line), style))

    def line(self, line: str, style: str = "") -> None:
        """Print a line that people copy: it is not wrapped."""
        if self.speaks:
            self.console.print(Text(printable(line), style), soft_wrap=True)

    def warn(self, lines: Iterable[str]) -> None:
        """Print warnings; only ``--json``, whose document holds them, silences these."""
        for line in lines if not self.json else ():
            self.console.print(Text(f"warning: {printable(line)}", "bold yellow"))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Print a table for people; a column whose title starts with ``#`` is set to the right."""
        if not self.speaks:
            return
        named = any(name.lstrip("#") for name in columns)
        heading = Text(printable(title), "bold") if title else None
        table = Table(title=heading, title_justify="left", box=None, pad_edge=False, show_header=named)
        for name in columns:
            right = name.startswith("#")
            table.add_column(
                name.lstrip("#"), justify="right" if right else "left", no_wrap=right, header_style="bold"
            )
        for row in rows:
            table.add_row(*(Text(printable(cell), _style(cell)) for cell in row))
        self.console.print(table)

    def facts(self, title: str, entries: Iterable[tuple[str, str]]) -> None:
        """Print named values for people."""
        self.table(title, ("", ""), entries)

    def error(self, error: BitwrightError) -> int:
        """Print an error the user can do something about; returns its exit code."""
        return self.failure(type(error).__name__, error.what, error.where, error.fix, error.exit_code)

    def failure(self, kind: str, what: str, where: str, fix: str, exit_code: int) -> int:
        """Print why nothing came of it; returns the exit code."""
        if self.json:
            record = {"class": kind, "where": where, "what": what, "fix": fix, "exit_code": exit_code}
            self.document({"error": record})
            return exit_code
        head = f"{where}: {what}" if where else what
        # Plain text without wrapping: messages are searched for and copied.
        print(f"{head}\n  fix: {fix}" if fix else head, file=sys.stderr)
        return exit_code


STYLES: Mapping[str, str] = {
    **dict.fromkeys(("int8", "int8-dynamic", "int8-row", "w8a16", "fp8", *SHORT_FORMATS), "blue"),
    **dict.fromkeys(("w8", "w4", "w3", "w2", "nf4", "ternary", "binary"), "magenta"),
    **dict.fromkeys(("fp8-weights", "fp16-weights", "fp16", "bf16"), "cyan"),
    "float": "yellow",
}


def _style(cell: str) -> str:
    return STYLES.get(cell, "")


def plain(value: object) -> object:
    """Return the JSON form of what ``json`` itself has none for."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, frozenset | set):
        return sorted(value)
    msg = f"{type(value).__name__} has no JSON form"
    raise TypeError(msg)
