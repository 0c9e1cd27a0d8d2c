"""Progress of every phase: bars on a terminal only, notes wherever people read along."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from bitwright.compiler.cli.output import Output
from bitwright.compiler.errors import printable


class TerminalProgress:
    """A line for each phase on a terminal, and notes.

    Args:
        out: Tells whether people read along.
        label: What is being made, shown before the phase.
    """

    def __init__(self, out: Output, label: str = "") -> None:
        self._label = label
        self._task: TaskID | None = None
        console = out.console
        self._speaks = out.speaks
        self._bars = Progress(
            SpinnerColumn(finished_text="\N{CHECK MARK}"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[what]}", style="dim", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not (out.speaks and console.is_terminal),
        )

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the finished lines on the terminal."""
        if error is None:
            self._finish()
        self._bars.stop()

    def phase(self, name: str) -> None:
        """A phase begins, so the one before it is done."""
        self._finish()
        text = f"{self._label} {name}" if self._label else name
        self._task = self._bars.add_task(text, total=None, what="")

    def step(self, done: int, total: int, what: str) -> None:
        """Work inside the phase; a total of 0 means that nobody knows how much there is."""
        if self._task is not None:
            figure = f"{done}/{total} {what}" if total else what
            self._bars.update(self._task, completed=done, total=total or None, what=printable(figure))

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        if self._speaks:
            self._bars.console.print(Text(printable(text)), soft_wrap=True)

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=1, total=1, what="")
            self._task = None
