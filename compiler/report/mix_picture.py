"""Which share of the layers, of the work and of the weights runs in which format, as bars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bitwright.compiler.report.figures import share_text
from bitwright.compiler.report.formats import KINDS, kind_of
from bitwright.compiler.report.markup import Markup, element
from bitwright.compiler.report.pictures import WIDTH, svg

LEFT, ROW, BAR = 190, 34, 24
# A narrower part has no room for its name; the tooltip has it.
NAMED_PART = 64


def weighted(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the layers with constant weights."""
    return [row for row in layers if row["parameters"] and row["role"] in ("anchor", "table")]


def mix_picture(layers: Sequence[Mapping[str, Any]]) -> Markup:
    """Return three stacked bars over layers with weights."""
    bars = (("Layers", "count"), ("Multiply-accumulates", "macs"), ("Weights", "parameters"))
    parts = []
    for k, (label, measure) in enumerate(bars):
        amounts: Counter[str] = Counter()
        for row in layers:
            amounts[row["format"]] += 1 if measure == "count" else row[measure]
        if amounts.total():
            parts.append(element("text", label, x=LEFT - 8, y=k * ROW + 20, text_anchor="end", class_="tick"))
            parts.extend(_stack(amounts, k * ROW + 4))
    return svg(len(bars) * ROW, "Mix of formats", parts)


def _stack(amounts: Mapping[str, int], y: int) -> Iterator[Markup]:
    total, x = sum(amounts.values()), float(LEFT)
    order = sorted(amounts, key=lambda fmt: (list(KINDS).index(kind_of(fmt)), -amounts[fmt], fmt))
    for fmt in order:
        width = (WIDTH - LEFT) * amounts[fmt] / total
        tip = element("title", f"{fmt}: {share_text(amounts[fmt] / total)}")
        if width > 0:
            shown = max(width - 1.5, 0.5)
            kind = f"bar {kind_of(fmt)}"
            yield element("rect", tip, x=x, y=y, width=shown, height=BAR, rx=2, class_=kind)
        if width >= NAMED_PART:
            yield element("text", fmt, x=x + width / 2, y=y + 16, text_anchor="middle", class_="inside")
        x += width
