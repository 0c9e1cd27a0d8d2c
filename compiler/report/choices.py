"""The page's sections on formats: their mix, what would help most, the migration, the allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitwright.compiler.allocate.nearest import NAMES, figure
from bitwright.compiler.report import tables
from bitwright.compiler.report.figures import DASH, count_text, decibel_text, gain_text, share_text
from bitwright.compiler.report.formats import KINDS, WORDS, kind_of
from bitwright.compiler.report.markup import Child, Markup, element
from bitwright.compiler.report.mix_picture import mix_picture, weighted
from bitwright.compiler.report.section import Section, key, section

SPREAD = (
    "None of them is worth a change alone: the noise is spread over many layers. What helps all of them is a recipe "
    "with finer formats, or more calibration data."
)
BLAME = {
    "weights": "its weights",
    "inputs": "its inputs",
    "both": "inputs and weights",
    "output": "the rounding of its output",
    "nothing": "nothing that shows",
}


def formats_section(content: Mapping[str, Any]) -> Section:
    """Return the mix of formats: by layers, by work and by weights."""
    layers = weighted(content["layers"])
    if not layers:
        return "Formats", None
    recipe = content.get("recipe")
    lead: list[Child] = ["What the layers with weights run in. "]
    if recipe is not None:
        said = f": {recipe['description']}" if recipe["description"] else ""
        lead += ["Recipe ", tables.code(recipe["name"]), f"{said}."]
    present = {kind_of(row["format"]) for row in layers}
    legend = key(*((kind, text) for kind, text in KINDS.items() if kind in present))
    return section("Formats", lead, legend, mix_picture(layers), _format_table(layers))


def _format_table(layers: Sequence[Mapping[str, Any]]) -> Markup:
    macs, parameters = (sum(row[name] for row in layers) for name in ("macs", "parameters"))
    rows = []
    for fmt in dict.fromkeys(row["format"] for row in layers):
        members = [row for row in layers if row["format"] == fmt]
        rows.append(
            [
                tables.format_pill(fmt),
                WORDS.get(fmt, ""),
                str(len(members)),
                _share(sum(row["macs"] for row in members), macs),
                _share(sum(row["parameters"] for row in members), parameters),
            ]
        )
    return tables.table(("Format", "", "#Layers", "#Multiply-accumulates", "#Weights"), rows)


def _share(part: int, total: int) -> str:
    return f"{count_text(part)}, {share_text(part / total)}" if total else DASH


def advice_section(content: Mapping[str, Any]) -> Section:
    """Return the worst layers, why they are, and the patch that helps."""
    rows = content.get("advice") or []
    lead = (
        "The layers with the largest errors of their own. Each was taken back to float alone, then only its inputs, "
        "then only its weights, and the model was run again: that is what its rounding costs the outputs. A patch "
        "changes one line of the plan, which is then the recipe of the next run."
    )
    command = next((row["command"] for row in rows if row["command"]), None)
    follow: Child = element("p", SPREAD, class_="soft") if rows else None
    if command is not None:
        how = f"bitwright explain OUT --apply better.plan.yaml\n{command}"
        follow = [element("p", "To follow all of the advice:", class_="soft"), element("pre", how)]
    return section("What would help most", lead, *(map(_advice, rows)), follow)


def _advice(row: Mapping[str, Any]) -> Markup:
    head = element(
        "h3", tables.code(row["node"]), " ", element("span", row["op"], class_="soft"), " ",
        tables.format_pill(row["format"]),
        [" \N{RIGHTWARDS ARROW} ", tables.format_pill(row["change"])] if row["change"] else None,
    )  # fmt: skip
    facts = [
        ("Own SQNR", decibel_text(row["own_sqnr_db"])),
        ("If it were float", gain_text(row["gain_db"])),
        ("If its inputs were exact", _gain(row["inputs_db"])),
        ("If its weights were exact", _gain(row["weights_db"])),
        *(
            [("If its output were exact", gain_text(row["output_db"]))]
            if row["output_db"] is not None
            else []
        ),
        ("To blame", BLAME[row["blame"]]),
        *(
            [(f"As {row['change']}", gain_text(row["change_db"]))]
            if row["change"] not in (None, "float")
            else []
        ),
    ]
    figures = [
        element("div", element("span", label, class_="sub"), element("strong", value))
        for label, value in facts
    ]
    return element(
        "div",
        head,
        element("p", row["text"]),
        element("div", *figures, class_="figures"),
        _diff(row["patch"]) if row["patch"] else None,
        class_="advice",
    )


def _gain(value: float | None) -> str:
    return "not separable" if value is None else gain_text(value)


def _diff(patch: str) -> Markup:
    lines = [
        element("span", line + "\n", class_={"+": "add", "-": "del"}.get(line[:1], "ctx"))
        for line in patch.splitlines()
    ]
    summary = element("summary", "patch to the plan")
    return element("details", summary, element("pre", *lines, class_="diff"), open=True)


def migration_section(content: Mapping[str, Any]) -> Section:
    """Return what every rewrite changed before rounding."""
    rows = [
        [
            tables.code(found["rewrite"]),
            str(found["changes"]),
            tables.note_list(found["notes"]),
        ]
        for found in content.get("migrations") or []
    ]
    lead = (
        "Rewrites of the float model that keep its function and make it easier to quantize, in the order in which they "
        "ran. The rewritten model was run against the one before."
    )
    return section("Migration", lead, tables.table(("Rewrite", "#Changes", "Notes"), rows) if rows else None)


def allocation_section(content: Mapping[str, Any]) -> Section:
    """Return the allocator's certificate, the price of every budget, and what was left out."""
    found = content.get("allocation")
    if found is None:
        return "Allocation", None
    name, value = NAMES[found["objective"]], figure(found["objective"], found["value"])
    proof = (
        "no other choice of formats within the budgets is better: the solver proved it"
        if found["proven"]
        else f"the solver ran out of time; the optimum is at most {found['gap']:.2%} better"
    )
    groups = len(found["formats"])
    lead = (
        f"Formats were chosen for {groups} groups of layers, for the least {name}. Found: {value}; {proof}."
    )
    dropped = [
        [tables.code(d["group"]), tables.format_pill(d["format"]), d["reason"]] for d in found["dropped"]
    ]
    return section(
        "Allocation",
        lead,
        _budgets(found) if found["budgets"] else element("p", "No budget was given."),
        element("p", "Left out before the choice:", class_="soft") if dropped else None,
        tables.table(("Group", "Format", "Why"), dropped) if dropped else None,
        _totals(found["totals"]),
    )


def _budgets(found: Mapping[str, Any]) -> Markup:
    rows: list[Sequence[Child]] = []
    for price in found["budgets"]:
        metric, limit = price["metric"], price["limit"]
        share = price["used"] / limit if limit > 0 else 0.0
        meter = element(
            "span", element("i", style=f"width:{min(share, 1.0) * 100:.0f}%"), class_="meter wide"
        )
        rows.append(
            [
                NAMES[metric],
                figure(metric, limit),
                [figure(metric, price["used"]), meter],
                tables.pill("binding", "short") if price["binding"] else tables.pill("free", "plain"),
                _bought(price, found),
            ]
        )
    return tables.table(("Budget", "#Limit", "#Used", "", "A little more would buy"), rows)


def _bought(price: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    gain = found["value"] - price["more_objective"]
    if not price["binding"] or gain <= 0:
        return "nothing"
    objective = found["objective"]
    share = f", {gain / abs(found['value']):.1%} less" if found["value"] else ""
    more = figure(price["metric"], price["more_limit"])
    return f"{NAMES[objective]} {figure(objective, price['more_objective'])}{share}, with {more}"


def _totals(totals: Mapping[str, float]) -> Markup:
    said = [f"{NAMES[metric]} {figure(metric, value)}" for metric, value in totals.items() if value]  # type: ignore[index, arg-type]
    return element("p", f"Predicted for the whole: {', '.join(said)}.", class_="soft")
