"""The report's pictures as inline SVG; colours come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.compiler.report.figures import decibel_text, size_text
from bitwright.compiler.report.formats import kind_of
from bitwright.compiler.report.markup import Markup, element

WIDTH = 920
LEFT = 46
PLOT_HEIGHT = 180
# More labels than this cannot be read side by side; the tooltip names every bar.
LABELLED_BARS = 32
LABEL_LENGTH = 16
WIDEST_BAR = 40
SHOWN_LAYERS = 14
TICKS_DB = 10
# No axis is longer; two equal tensors have no noise at all, their bar ends at its end.
TOP_DB, EXACT_DB = 100.0, 200.0


def sqnr_picture(measured: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Return one bar for each measured tensor, named after what writes it; None if there is none.

    A line across the bar is the layer's own noise, a row's ``own_sqnr_db``.
    """
    if not measured:
        return None
    top = _top(measured)
    step = (WIDTH - LEFT) / len(measured)
    bars = [_bar(row, LEFT + k * step, step, top) for k, row in enumerate(measured)]
    labelled = len(measured) <= LABELLED_BARS
    labels = (
        [_label(row["node"], LEFT + (k + 0.5) * step) for k, row in enumerate(measured)] if labelled else []
    )
    longest = max(len(_shortened(row["node"], LABEL_LENGTH)) for row in measured)
    height = PLOT_HEIGHT + (22 + 4.6 * longest if labelled else 14)
    owns = [
        _own(row, LEFT + k * step, step, top)
        for k, row in enumerate(measured)
        if row["own_sqnr_db"] is not None
    ]
    return svg(height, "Signal to quantization noise by layer", _grid(top), bars, owns, labels)


def _top(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the end of the axis: the next ten above the largest measured value that is not exact."""
    values = [row[name] for row in rows for name in ("sqnr_db", "own_sqnr_db") if row[name] is not None]
    largest = max((value for value in values if value < EXACT_DB), default=TOP_DB)
    return min(max(20.0, TICKS_DB * -(-largest // TICKS_DB)), TOP_DB)


def _grid(top: float) -> list[Markup]:
    marks = []
    for value in range(0, int(top) + 1, TICKS_DB):
        y = _height(value, top)
        marks.append(element("line", x1=LEFT, x2=WIDTH, y1=y, y2=y, class_="grid"))
        text = f"{value} dB" if value else "0"
        marks.append(element("text", text, x=LEFT - 6, y=y + 4, text_anchor="end", class_="tick"))
    return marks


def _height(value: float, top: float) -> float:
    return 8 + (PLOT_HEIGHT - 8) * (1 - value / top)


def _bar(row: Mapping[str, Any], x: float, step: float, top: float) -> Markup:
    y = _height(max(0.0, min(row["sqnr_db"], top)), top)
    gap = max(step * 0.25, step - WIDEST_BAR)
    tip = element("title", _tip(row))
    kind = kind_of(row["format"])
    height = max(PLOT_HEIGHT - y, 1.0)
    return element(
        "rect", tip, x=x + gap / 2, y=y, width=step - gap, height=height, rx=2, class_=f"bar {kind}"
    )


def _tip(row: Mapping[str, Any]) -> str:
    own = "" if row["own_sqnr_db"] is None else f", its own noise alone {decibel_text(row['own_sqnr_db'])}"
    return f"{row['node']} ({row['op']}, {row['format']}): {decibel_text(row['sqnr_db'])}{own}"


def _own(row: Mapping[str, Any], x: float, step: float, top: float) -> Markup:
    """Return the mark of a layer's own noise, a little wider than its bar."""
    y = _height(max(0.0, min(row["own_sqnr_db"], top)), top)
    gap = max(step * 0.25, step - WIDEST_BAR) * 0.6
    tip = element("title", _tip(row))
    return element(
        "rect", tip, x=x + gap / 2, y=y - 1.5, width=step - gap, height=3, rx=1.5, class_="bar own"
    )


def _label(name: str, x: float) -> Markup:
    y = PLOT_HEIGHT + 12
    short = _shortened(name, LABEL_LENGTH)
    turn = f"rotate(-45 {x:.1f} {y})"
    return element("text", short, x=x, y=y, transform=turn, text_anchor="end", class_="tick")


def _shortened(name: str, length: int) -> str:
    """Return the end of a name, which is what tells layers apart."""
    return name if len(name) <= length else "\N{HORIZONTAL ELLIPSIS}" + name[-length + 1 :]


def size_by_layer(ledger: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """Return (layer, bytes before, bytes after), the largest first; layers beyond the first few are one row."""
    before: dict[str, int] = defaultdict(int)
    after: dict[str, int] = defaultdict(int)
    for row in ledger:
        before[row["node"]] += row["float_bytes"]
        after[row["node"]] += row["bytes"]
    order = sorted(after, key=lambda node: (-max(before[node], after[node]), node))
    rows = [(node or "(nobody)", before[node], after[node]) for node in order]
    rest = rows[SHOWN_LAYERS:]
    if len(rest) < 2:
        return rows
    total = (f"{len(rest)} more", sum(r[1] for r in rest), sum(r[2] for r in rest))
    return [*rows[:SHOWN_LAYERS], total]


def size_picture(ledger: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Return the bytes of every layer's constants, before and after; None without constants."""
    rows = size_by_layer(ledger)
    longest = max((max(before, after) for _, before, after in rows), default=0)
    if not longest:
        return None
    height = 22
    parts = [_size_row(row, k * height, longest) for k, row in enumerate(rows)]
    return svg(len(rows) * height + 4, "Bytes by layer, before and after", parts)


def _size_row(row: tuple[str, int, int], y: int, longest: int) -> Markup:
    name, before, after = row
    start, end = 190, WIDTH - 150
    scale = (end - start) / longest
    tip = element("title", f"{name}: {size_text(before)} in float, {size_text(after)} now")
    figures = f"{size_text(before)} \N{RIGHTWARDS ARROW} {size_text(after)}"
    return element(
        "g",
        tip,
        element("text", _shortened(name, 26), x=start - 8, y=y + 15, text_anchor="end", class_="tick"),
        element(
            "rect", x=start, y=y + 4, width=max(before * scale, 1.0), height=14, rx=2, class_="bar ghost"
        ),
        element(
            "rect", x=start, y=y + 4, width=max(after * scale, 1.0), height=14, rx=2, class_="bar integer"
        ),
        element("text", figures, x=start + max(before, after) * scale + 8, y=y + 15, class_="tick"),
    )


def svg(height: float, title: str, *parts: Any) -> Markup:
    """Return a picture as wide as the page."""
    box = f"0 0 {WIDTH} {height:.0f}"
    return element("svg", element("title", title), *parts, viewBox=box, role="img", class_="picture")
