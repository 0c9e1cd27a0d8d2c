"""The results as Markdown tables, one a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo import model_named

from quantization.competitors import ALL, COMPETITORS, Competitor
from quantization.results import Results

MODELS_BY_COSINE = ("minilm_l6",)


def _fidelity_heads(model: str) -> list[str]:
    if model in MODELS_BY_COSINE:
        return ["cosine", "least cosine", "cosine, padded texts too"]
    return ["SQNR dB", "same argmax"]


def _fidelity(model: str, row: Mapping[str, Any]) -> list[str]:
    if model in MODELS_BY_COSINE:
        return [f"{row[k]:.4f}" for k in ("cosine", "least_cosine", "cosine_with_padded")]
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


def _failed(label: str, row: Mapping[str, Any], width: int) -> str:
    reason = str(row["error"]).replace("|", "\\|")
    return f"| {label} | {reason} {'| ' * (width - 2)}|"


def _times_head(rows: list[Mapping[str, Any]]) -> str:
    labels = next((list(r["time"]) for r in rows if "time" in r), [""])
    return "time / fp32" + (f" ({' / '.join(labels)})" if labels != [""] else "")


def model_table(model: str, results: Results) -> str:
    """Return one model's table."""
    ordered = sorted(COMPETITORS, key=lambda c: c.family != "8-bit")
    everyone = [(c, results[model, c.name]) for c in ordered if (model, c.name) in results]
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
        blank = "| " * len(_fidelity_heads(model))
        lines.append(f"| fp32 | {plain['metric']:.4f} {blank}| 1 | {plain['bytes'] / 1e6:.3g} | | |")
    for competitor, row in everyone:
        if "error" in row:
            lines.append(_failed(competitor.label, row, len(heads)))
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
