"""``explain``: everything a report knows about one node, and what would help most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.compiler.errors import UsageError, nearest


def explain(content: Mapping[str, Any], node: str) -> dict[str, Any]:
    """Return the report's row of a node.

    Args:
        content: The content of a report.json.
        node: A node's name; a node that is fused behind another gives that one's row.

    Returns:
        The row of ``layers`` or ``float``, with ``asked`` (the name asked for), ``bytes`` and ``float_bytes`` of its
        constants, ``findings`` of the ONNX Runtime audit that name it, and ``advice`` if it is one of the worst.

    Raises:
        UsageError: The report has no such node; the nearest name is in the message.
    """
    rows = {row["node"]: row for row in (*content["float"], *content["layers"])}
    fused = {name: row for row in content["layers"] for name in row["fused"]}
    row = rows.get(node) or fused.get(node)
    if row is None:
        what = f"the report has no node '{node}'"
        raise UsageError(what, where=content["model"]["file"], fix=_suggestion(node, [*rows, *fused]))
    constants = [r for r in content["sizes"] if r["node"] == row["node"]]
    findings = (content.get("audit") or {}).get("findings", [])
    return {
        "format": "float",
        **row,
        "asked": node,
        "bytes": sum(r["bytes"] for r in constants),
        "float_bytes": sum(r["float_bytes"] for r in constants),
        "findings": [f for f in findings if row["node"] in (f["node"], f["tensor"])],
        "advice": next((a for a in content.get("advice", ()) if a["node"] == row["node"]), None),
    }


def changes(content: Mapping[str, Any], node: str | None = None) -> dict[str, str]:
    """Return the formats that a report advises: those of the worst layers, or of one of them.

    Args:
        content: The content of a report.json.
        node: Only this node's.

    Raises:
        UsageError: There is no advice to follow.
    """
    asked = None if node is None else explain(content, node)["node"]
    found = {
        a["node"]: a["change"]
        for a in content["advice"]
        if a["change"] is not None and asked in (None, a["node"])
    }
    if not found:
        about = "for any layer" if node is None else f"for '{node}'"
        known = [a["node"] for a in content["advice"] if a["change"] is not None]
        what = f"the report advises no change {about}"
        fix = f"it advises one for {', '.join(known)}" if known else "no single layer costs the outputs much"
        raise UsageError(what, where=content["model"]["file"], fix=fix)
    return found


def _suggestion(node: str, known: list[str]) -> str:
    text = nearest(node, known)
    if text.startswith("did you mean") or len(known) <= 12:
        return text
    return f"one of {', '.join(known[:12])}, ... ({len(known)} nodes; report.html lists them)"
