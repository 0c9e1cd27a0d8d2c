"""Other formats for single nodes of a plan.yaml, as text: everything else stays as it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitwright.compiler.errors import ProfileError, UsageError, nearest
from bitwright.targets import yaml_reader as yaml

CONTEXT = 3


@dataclass(frozen=True)
class Place:
    """Where a node's format stands; ``line`` and ``column`` count from 0."""

    line: int
    column: int
    text: str


@dataclass(frozen=True)
class PlanText:
    """A plan.yaml that is edited as text.

    Attributes:
        text: The whole file.
        places: Node -> its format in the text.
        shown: The file's name in messages and patches.
    """

    text: str
    places: Mapping[str, Place]
    shown: str

    @classmethod
    def read(cls, text: str, shown: str) -> PlanText:
        """Find the nodes of a plan.

        Raises:
            UsageError: It is not a plan.yaml.
        """
        try:
            root = yaml.parse(text, shown)
        except ProfileError as error:
            raise UsageError(error.what, where=error.where, fix=error.fix) from error
        nodes = root.entries.get("nodes")
        if not isinstance(nodes, yaml.Sequence):
            what = "not a plan: it has no list of nodes"
            raise UsageError(what, where=shown, fix="name a plan.yaml that compile or quantize wrote")
        return cls(text, dict(_places(nodes, text.splitlines())), shown)

    def with_formats(self, formats: Mapping[str, str]) -> str:
        """Return the text with other formats for some nodes.

        Raises:
            UsageError: The plan has no such node.
        """
        lines = self.text.splitlines(keepends=True)
        for node, fmt in formats.items():
            place = self._place(node)
            lines[place.line] = _replaced(lines[place.line], place, fmt)
        return "".join(lines)

    def patch(self, node: str, fmt: str) -> str:
        """Return the unified diff that gives one node another format; ``patch`` applies it.

        Raises:
            UsageError: The plan has no such node.
        """
        place = self._place(node)
        lines = self.text.splitlines()
        first, last = max(0, place.line - CONTEXT), min(len(lines), place.line + CONTEXT + 1)
        old, new = lines[place.line], _replaced(lines[place.line], place, fmt)
        span = f"{first + 1},{last - first}"
        body = [
            *(f" {line}" for line in lines[first : place.line]),
            f"-{old}",
            f"+{new}",
            *(f" {line}" for line in lines[place.line + 1 : last]),
        ]
        return "\n".join([f"--- {self.shown}", f"+++ {self.shown}", f"@@ -{span} +{span} @@", *body, ""])

    def _place(self, node: str) -> Place:
        if node not in self.places:
            what = f"the plan has no node '{node}'"
            raise UsageError(what, where=self.shown, fix=nearest(node, list(self.places)))
        return self.places[node]


def _replaced(line: str, place: Place, fmt: str) -> str:
    return line[: place.column] + fmt + line[place.column + len(place.text) :]


def _places(nodes: yaml.Sequence, lines: list[str]) -> Iterator[tuple[str, Place]]:
    for entry in nodes.items:
        if not isinstance(entry, yaml.Mapping):
            continue
        name, fmt = entry.entries.get("node"), entry.entries.get("format")
        if isinstance(name, yaml.Scalar) and isinstance(fmt, yaml.Scalar):
            line, column = fmt.mark.line - 1, fmt.mark.column - 1
            yield str(name.value), Place(line, column, _written(lines[line][column:], fmt.text))


def _written(rest: str, text: str) -> str:
    """Return a scalar as it stands in the file, with its quotes."""
    return rest[: len(text) + 2] if rest[:1] in ("'", '"') else text
