"""The page's section on kernels that were chosen by measuring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.compiler.report.figures import DASH, seconds_text
from bitwright.compiler.report.markup import Child
from bitwright.compiler.report.section import Section, section
from bitwright.compiler.report.tables import code, pill, table

TITLE = "Tuned kernels"


def tuning_section(found: Mapping[str, Any] | None) -> Section:
    """Return the section; nothing was chosen and nothing measured: no section."""
    if found is None or not any(row["record"] for row in found["kernels"]):
        return TITLE, None
    modelled = " Times are modelled, not measured on silicon." if found["executed"] == "modelled" else ""
    gain = f" Their time is {found['ratio']:.2f} of the defaults'." if found["ratio"] is not None else ""
    spent = (
        f"{found['trials']} kernels were measured in {found['seconds']:.0f} s."
        if found["trials"]
        else "Nothing was measured: earlier records were used."
    )
    columns = ("Work", "#Steps", "Kernel", "#Default", "#Ratio", "From", "Record")
    rows = [_row(row) for row in found["kernels"] if row["record"]]
    return section(TITLE, f"{spent}{gain}{modelled}", table(columns, rows, tall=len(rows) > 12))


def _row(row: Mapping[str, Any]) -> tuple[Child, ...]:
    chosen = row["source"] != "default"
    return (
        row["workload"],
        str(len(row["steps"])),
        code(row["kernel"]) if chosen else "default",
        DASH if row["default_s"] is None else seconds_text(row["default_s"]),
        f"{row['ratio']:.2f}" if chosen and row["ratio"] is not None else DASH,
        pill(row["source"], "plain"),
        code(row["record"]),
    )
