"""Tables that several verbs print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.compiler.cli.output import Output
from bitwright.compiler.inspect import Inspection
from bitwright.compiler.report.figures import (
    DASH,
    count_text,
    decibel_text,
    seconds_text,
    share_text,
    size_text,
    speed_text,
)
from bitwright.compiler.report.formats import short_weight_text
from bitwright.compiler.report.headline import headline


def print_report(out: Output, content: Mapping[str, Any], *, layers: bool = False) -> None:
    """Print the headline of a report, its layers if wanted, and with ``-v`` what every phase noted."""
    out.warn(content["warnings"])
    title = f"{content['model']['file']} for {content['target']['name']}"
    rows = [(fact.label, fact.value, fact.detail) for fact in headline(content)]
    out.table(title, ("", "#", ""), rows)
    if layers:
        _print_layers(out, content["layers"])
        _print_float(out, content["float"])
    if out.verbose:
        phases = [(p["name"], seconds_text(p["seconds"]), "\n".join(p["notes"])) for p in content["phases"]]
        out.table("\nPhases", ("Phase", "#Time", "Notes"), phases)


def _print_layers(out: Output, layers: list[dict[str, Any]]) -> None:
    columns = (
        "Node",
        "Operator",
        "Format",
        "Weight",
        "#Own",
        "#SQNR",
        "#MACs",
        "#Estimated",
        "#In float",
    )
    out.table("\nLayers", columns, [_layer(row) for row in layers])


def _layer(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["node"],
        row["op"],
        row["format"],
        DASH if row["weight_quant"] is None else short_weight_text(row["weight_quant"]),
        decibel_text(row["own_sqnr_db"]),
        decibel_text(row["sqnr_db"]),
        count_text(row["macs"]) if row["macs"] else DASH,
        seconds_text(row["estimated_s"] or None),
        seconds_text(row["estimated_float_s"] or None),
    )


def _print_float(out: Output, rows: list[dict[str, Any]]) -> None:
    reasons: dict[str, int] = {}
    for row in rows:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    if reasons:
        order = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
        out.table("\nStayed float", ("#Nodes", "Why"), [(str(count), reason) for reason, count in order])


def print_shipped(out: Output, found: dict[str, Any] | None) -> None:
    """Print the files that a program needs at run time, with their sizes."""
    if found is None:
        return
    rows = [(f["name"], f["what"], size_text(f["bytes"])) for f in found["files"]]
    rows.append(("together", "", size_text(found["bytes"])))
    if found["static"] is not None:
        rows.append(
            (found["static"]["name"], "to be linked, for model.so", size_text(found["static"]["bytes"]))
        )
    out.table("\nNeeded at run time, in lib", ("File", "What", "#Size"), rows)


def print_inspection(out: Output, found: Inspection) -> None:
    """Print what a target would do with a model."""
    out.warn(found.warnings)
    dims = ", ".join(f"{k}={v}" for k, v in found.dims.items())
    assumed = f" ({', '.join(found.assumed)} assumed: name it with --dim)" if found.assumed else ""
    speed = speed_text(found.estimated_s / found.estimated_float_s) if found.estimated_float_s else DASH
    facts = [
        ("In integers", share_text(found.integer_share), f"of {count_text(found.macs)} multiply-accumulates"),
        ("Constants", size_text(found.bytes), f"{size_text(found.float_bytes)} in float"),
        (
            "Time of a call",
            seconds_text(found.estimated_s),
            f"{seconds_text(found.estimated_float_s)} in float: {speed} as fast, {found.estimate}",
        ),
        ("Activations", size_text(found.peak_ram_bytes), "alive at once, at least"),
        ("Planned for", found.runtime, f"{dims}{assumed}" if dims else "fixed shapes"),
    ]
    out.table(f"{found.model} for {found.target}", ("", "#", ""), facts)
    shown = [r for r in found.rows if r.role or out.verbose]
    columns = ("Node", "Operator", "Format", "#MACs", "#Estimated", "#In float", "Why")
    rows = [
        (
            r.node,
            r.op,
            r.format,
            count_text(r.macs) if r.macs else DASH,
            seconds_text(r.estimated_s),
            seconds_text(r.estimated_float_s),
            r.reason if r.format == "float" else r.role,
        )
        for r in shown
    ]
    out.table("\nOperators", columns, rows)
    hidden = len(found.rows) - len(shown)
    if hidden:
        out.say(f"without an integer kernel on this target and not listed: {hidden} (-v lists them)")
