"""Tables of the report page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitwright.compiler.report.figures import (
    DASH,
    count_text,
    decibel_text,
    number_text,
    seconds_text,
    share_text,
    size_text,
)
from bitwright.compiler.report.formats import WORDS, kind_of, weight_text
from bitwright.compiler.report.markup import Child, Markup, element

SHOWN_ROWS = 12
SHOWN_NODES = 12
SHOWN_NOTES = 6
FULL_METER_DB = 50.0


def table(columns: Sequence[str], rows: Iterable[Sequence[Child]], *, tall: bool = False) -> Markup:
    """Return a table; a column whose title starts with ``#`` holds figures and is set to the right."""
    numeric = [title.startswith("#") for title in columns]
    head = [
        element("th", t.lstrip("#"), class_="n" if n else None) for t, n in zip(columns, numeric, strict=True)
    ]
    body = [element("tr", *(_cell(c, n) for c, n in zip(row, numeric, strict=True))) for row in rows]
    inside = element("table", element("thead", element("tr", *head)), element("tbody", *body))
    return element("div", inside, class_="scroll tall" if tall else "scroll")


def _cell(child: Child, numeric: bool) -> Markup:
    if isinstance(child, Markup) and child.startswith("<td"):
        return child
    return element("td", child, class_="n" if numeric else None)


def code(text: str) -> Markup:
    """Return a name set in a fixed-width face."""
    return element("code", text)


def pill(text: str, kind: str) -> Markup:
    """Return a small label."""
    return element("span", text, class_=f"pill {kind}")


def format_pill(fmt: str) -> Markup:
    """Return the label of a format in the colour of its kind, its meaning in the tooltip."""
    return element("span", fmt, class_=f"pill {kind_of(fmt)}", title=WORDS.get(fmt))


def note_list(notes: Sequence[str]) -> Child:
    """Return notes as a list; more than a few are folded."""
    first, rest = notes[:SHOWN_NOTES], notes[SHOWN_NOTES:]
    if not notes:
        return ""
    shown = element("ul", *(element("li", note) for note in first), class_="notes")
    if not rest:
        return shown
    more = element("ul", *(element("li", note) for note in rest), class_="notes")
    return [shown, element("details", element("summary", f"{len(rest)} more"), more)]


def layer_table(layers: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the table of all operators that the profile has a rule for; small ones that stayed float are folded."""
    columns = (
        "Operator",
        "Format",
        "Why",
        "Reads",
        "#Own",
        "#SQNR",
        "#MACs",
        "#Estimated",
        "#In float",
        "#Measured",
        "Weight",
    )
    folded = [row for row in layers if row["format"] == "float" and row["role"] != "anchor"]
    shown = [row for row in layers if row not in folded]
    open_table = table(columns, [_layer_row(row) for row in shown], tall=len(shown) > SHOWN_ROWS)
    if not folded:
        return open_table
    summary = element("summary", f"{len(folded)} operators without weights that stayed in float")
    return Markup(
        open_table + element("details", summary, table(columns, map(_layer_row, folded), tall=True))
    )


def _layer_row(row: Mapping[str, Any]) -> list[Child]:
    fused = f" + {', '.join(row['fused'])}" if row["fused"] else ""
    return [
        element("td", code(row["node"]), element("span", f"{row['op']}{fused}", class_="sub"), class_="name"),
        element("td", format_pill(row["format"]), element("span", row["role"], class_="sub")),
        element("td", row["reason"], class_="why"),
        _quantizer(row["input_quant"]),
        _noise(row["own_sqnr_db"]),
        _noise(row["sqnr_db"]),
        count_text(row["macs"]) if row["macs"] else DASH,
        seconds_text(row["estimated_s"] or None),
        seconds_text(row["estimated_float_s"] or None),
        seconds_text(row["measured_s"]),
        _weight(row),
    ]


def _quantizer(quant: Mapping[str, Any] | None) -> Markup:
    if quant is None:
        return element("td", DASH)
    head = f"{quant['dtype']}, scale {number_text(quant['scale'])}"
    tie = f", shared with {quant['tie']}" if quant["tie"] and quant["tie"] != quant["tensor"] else ""
    span = (
        f"zero point {quant['zero_point']}, [{number_text(quant['low'])}, {number_text(quant['high'])}]{tie}"
    )
    return element(
        "td", head, element("span", span, class_="sub"), class_="reads", title=f"by {quant['method']}"
    )


def _noise(value: float | None) -> Child:
    if value is None:
        return DASH
    width = max(0.0, min(value / FULL_METER_DB, 1.0)) * 100
    meter = element("span", element("i", style=f"width:{width:.0f}%"), class_="meter")
    return [decibel_text(value), meter]


def _weight(row: Mapping[str, Any]) -> Child:
    if row["weight_quant"] is None:
        return DASH
    words = weight_text(row["weight_quant"])
    if row["weight_scales"] is None:
        return element("td", words, class_="weight")
    low, high = number_text(row["weight_scale_min"], 2), number_text(row["weight_scale_max"], 2)
    span = low if low == high else f"{low} \N{HORIZONTAL ELLIPSIS} {high}"
    return element("td", words, element("span", f"scales {span}", class_="sub"), class_="weight")


def size_table(ledger: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the size ledger: the largest rows open, the rest folded."""
    columns = ("Initializer", "Read by", "Type", "Shape", "#Float", "#Now")
    rows = [_size_row(row) for row in ledger]
    first, rest = rows[:SHOWN_ROWS], rows[SHOWN_ROWS:]
    if not rest:
        return table(columns, first)
    count = sum(row["bytes"] for row in ledger[SHOWN_ROWS:])
    summary = element("summary", f"{len(rest)} more initializers, {size_text(count)}")
    return Markup(table(columns, first) + element("details", summary, table(columns, rest, tall=True)))


def _size_row(row: Mapping[str, Any]) -> list[Child]:
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, row["shape"])) or "scalar"
    before = size_text(row["float_bytes"]) if row["float_bytes"] else "new"
    name = element("td", code(row["initializer"]), class_="name")
    reader = element("td", row["node"], class_="name")
    return [name, reader, row["dtype"], shape, before, size_text(row["bytes"])]


def float_groups(rows: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Return what stayed float, grouped by reason, the most frequent first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[row["reason"]].append(row["node"])
    order = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_group(reason, nodes) for reason, nodes in order]


def _group(reason: str, nodes: Sequence[str]) -> Markup:
    shown = ", ".join(nodes[:SHOWN_NODES])
    head = element("div", element("strong", f"{len(nodes)}"), "  ", reason)
    if len(nodes) <= SHOWN_NODES:
        return element("div", head, element("div", code(shown), class_="nodes"), class_="reason")
    rest = element("details", element("summary", f"all {len(nodes)} nodes"), code(", ".join(nodes)))
    return element(
        "div",
        head,
        element("div", code(shown), ", \N{HORIZONTAL ELLIPSIS}", rest, class_="nodes"),
        class_="reason",
    )


def gate_table(gate: Mapping[str, Any]) -> Markup:
    """Return what the no-regret gate measured."""
    rows = [
        [
            t["subject"],
            f"{t['ratio']:.3f}",
            pill("adopted", "integer") if t["adopted"] else pill("rejected", "plain"),
        ]
        for t in gate["trials"]
    ]
    return table(("What was tried", "#Time ratio", "Outcome"), rows)


def audit_tables(audit: Mapping[str, Any]) -> list[Markup]:
    """Return the operators of the optimized graph, then everything in it that is no integer kernel."""
    operators = sorted(audit["operators"].items(), key=lambda item: (-item[1], item[0]))
    found = [
        table(("Operator in ONNX Runtime's graph", "#Count"), [[code(op), str(n)] for op, n in operators])
    ]
    findings = sorted(audit["findings"], key=lambda f: f["harmless"])
    if findings:
        rows = [_finding_row(f) for f in findings]
        columns = ("Finding", "Node", "Tensor", "Why", "Planned")
        found.append(table(columns, rows, tall=len(rows) > SHOWN_ROWS))
    patterns = audit.get("patterns", [])
    if patterns:
        shown = [
            [element("td", code(p["node"]), class_="name"), code(p["pattern"]), p["kernel"]] for p in patterns
        ]
        heads = ("Quantized node", "Pattern that is expected to fuse", "Into")
        found.append(table(heads, shown, tall=len(shown) > SHOWN_ROWS))
    return found


def _finding_row(finding: Mapping[str, Any]) -> list[Child]:
    verdict = pill("yes", "plain") if finding["harmless"] else element("strong", "no", class_="warn-text")
    node, tensor = (element("td", code(finding[key]), class_="name") for key in ("node", "tensor"))
    return [finding["kind"], node, tensor, element("td", finding["why"], class_="why"), verdict]


def output_table(outputs: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the artifact's outputs against the references."""
    columns = ("Output", "Type", "Golden set", "Reference", "#Elements", "#Differing", "#Largest difference")
    rows = [
        [
            code(o["output"]),
            o["dtype"],
            str(o["golden"]),
            o["reference"],
            str(o["difference"]["elements"]),
            str(o["difference"]["differing"]),
            _largest(o["difference"]),
        ]
        for o in outputs
    ]
    return table(columns, rows, tall=len(rows) > SHOWN_ROWS)


def kernel_difference_table(differences: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the kernel calls that are not equal to the reference."""
    columns = ("Step", "Kernel", "Golden set", "#Elements", "#Differing", "#Largest, steps")
    rows = [
        [
            code(d["step"]),
            code(d["function"]),
            str(d["golden"]),
            str(d["difference"]["elements"]),
            str(d["difference"]["differing"]),
            _largest(d["difference"]),
        ]
        for d in differences
    ]
    return table(columns, rows, tall=len(rows) > SHOWN_ROWS)


def _largest(difference: Mapping[str, Any]) -> str:
    return "not finite" if difference["largest"] is None else number_text(difference["largest"])


def phase_table(phases: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the phases with their times and notes."""
    total = sum(p["seconds"] for p in phases) or 1.0
    rows = [
        [
            p["name"],
            seconds_text(p["seconds"]),
            share_text(p["seconds"] / total),
            note_list(p["notes"]),
        ]
        for p in phases
    ]
    return table(("Phase", "#Time", "#Share", "Notes"), rows)
