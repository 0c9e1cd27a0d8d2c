"""The results as Markdown tables, one a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantization.competitors import ALL, COMPETITORS, Competitor
from quantization.results import Results
from zoo import model_named

MODELS_BY_COSINE = ("minilm_l6",)


def _fidelity_heads(model: str) -> list[str]:
    return ["cosine", "least cosine"] if model in MODELS_BY_COSINE else ["SQNR dB", "same argmax"]


def _fidelity(model: str, row: Mapping[str, Any]) -> list[str]:
    if model in MODELS_BY_COSINE:
        return [f"{row['cosine']:.4f}", f"{row['least_cosine']:.3f}"]
    return [f"{row['sqnr_db']:.1f}", f"{row['agreement']:.3f}"]


def _cells(model: str, row: Mapping[str, Any]) -> list[str]:
    """Return the cells behind the label of a row that was measured."""
    times = " / ".join(f"{t['ratio']:.2f}" for t in row["time"].values())
    return [
        f"{row['metric']:.4f}",
        *_fidelity(model, row),
        times,
        f"{row['bytes'] / 1e6:.3g}",
        f"{row['wall_s']:.0f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
    ]


def _failed(model: str, label: str, row: Mapping[str, Any], width: int) -> str:
    reason = str(row["error"]).replace("|", "\\|")
    return f"| {label} | {reason} " + "| " * (width - 2) + "|"


def _times_head(rows: list[Mapping[str, Any]]) -> str:
    labels = next((list(r["time"]) for r in rows if "time" in r), [""])
    return "time / fp32" + (f" ({' / '.join(labels)})" if labels != [""] else "")


def model_table(model: str, results: Results) -> str:
    """Return one model's table."""
    everyone = [(c, results[model, c.name]) for c in COMPETITORS if (model, c.name) in results]
    heads = [
        "tool and setting",
        model_named(model).metric,
        *_fidelity_heads(model),
        _times_head([row for _, row in everyone]),
        "MB",
        "quantize s",
        "peak MB",
    ]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    plain = results.get((model, "fp32"))
    if plain is not None:
        lines.append(f"| fp32 | {plain['metric']:.4f} | | | 1 | {plain['bytes'] / 1e6:.3g} | | |")
    for competitor, row in everyone:
        if "error" in row:
            lines.append(_failed(model, competitor.label, row, len(heads)))
        else:
            lines.append(f"| {competitor.label} | {' | '.join(_cells(model, row))} |")
    return "\n".join(lines)


def measured(results: Results, model: str) -> list[tuple[Competitor, Mapping[str, Any]]]:
    """Return the competitors that have figures."""
    found = ((c, results.get((model, c.name))) for c in COMPETITORS)
    return [(c, row) for c, row in found if row is not None and "error" not in row]


def markdown(results: Results) -> str:
    """Return all tables, each under its model's name."""
    models = [m for m in ALL if any(key[0] == m for key in results)]
    return "\n\n".join(f"### {m}\n\n{model_table(m, results)}" for m in models) + "\n"
