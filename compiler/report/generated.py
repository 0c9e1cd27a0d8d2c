"""What a generator wrote: predicted and measured figures, and the tables of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.report.figures import DASH, number_text
from bitwright.compiler.report.markup import Child, element
from bitwright.compiler.report.section import Section, section
from bitwright.compiler.report.tables import table


def generated_section(c: Compilation) -> dict[str, Any] | None:
    """Return figures and tables of a generated artifact; None for a library.

    Keys: ``measurements`` (``label``, ``value``, ``detail``), ``tables`` (``title``, ``columns``, ``rows``, ``note``),
    ``not_generated`` (node -> why), ``seconds`` (predicted, or None).
    """
    if c.generated is None:
        return None
    found = c.generated
    return {
        "measurements": [asdict(m) for m in found.measurements],
        "tables": [asdict(t) for t in found.tables],
        "not_generated": dict(found.not_generated),
        "seconds": found.seconds,
    }


def generated_page(found: Mapping[str, Any] | None) -> Section:
    """Return the section of the page."""
    if found is None:
        return "Generated artifact", None
    figures: list[list[Child]] = [[m["label"], m["value"], m["detail"]] for m in found["measurements"]]
    parts: list[Child] = [table(("Figure", "#Value", "What it is"), figures)] if figures else []
    for each in found["tables"]:
        parts += [element("h3", each["title"]), *([element("p", each["note"])] if each["note"] else [])]
        parts.append(table(each["columns"], [list(map(_cell, row)) for row in each["rows"]], tall=True))
    if found["not_generated"]:
        rows: list[list[Child]] = [[node, why] for node, why in found["not_generated"].items()]
        parts += [element("h3", "Not on the target"), table(("Node", "Why"), rows)]
    return section(
        "Generated artifact",
        "What was generated, what it was predicted to take and what was measured.",
        *parts,
    )


def _cell(value: str | int | float | None) -> str:
    if value is None:
        return DASH
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else number_text(value)
