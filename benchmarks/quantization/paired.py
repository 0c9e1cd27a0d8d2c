"""Quantizing time of Bitwright's 8-bit flow against NNCF's transformer mode on minilm, turn by turn."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from quantization.compare import Runner
from quantization.competitors import COMPETITORS, Competitor

MODEL = "minilm_l6"


def competitor_named(name: str) -> Competitor:
    """Return one competitor."""
    return next(c for c in COMPETITORS if c.name == name)


def _turn(runner: Runner, competitor: Competitor) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        row = runner.quantize(competitor, MODEL, Path(scratch))
    if "error" in row:
        msg = f"{competitor.name}: {row['error']}"
        raise RuntimeError(msg)
    return row


def paired(runner: Runner, *, ours: str, rival: str, rounds: int) -> str:
    """Quantize alternately and return a Markdown table.

    The whole process counts: start, imports, reading, calibration, writing. Who goes first changes every round.

    Args:
        runner: Starts the processes.
        ours: Competitor name.
        rival: Competitor name.
        rounds: How often each quantizes.

    Raises:
        RuntimeError: One of them fails.
    """
    pair = competitor_named(ours), competitor_named(rival)
    turns: dict[str, list[dict[str, Any]]] = {c.name: [] for c in pair}
    for k in range(rounds):
        for competitor in pair if k % 2 == 0 else pair[::-1]:
            turns[competitor.name].append(_turn(runner, competitor))
    return table(turns)


def table(turns: dict[str, list[dict[str, Any]]]) -> str:
    """Return medians of each and of the ratios of the rounds; the first competitor over the second."""
    columns = {"wall s": ("wall_s", 1.0), "processor s": ("cpu_s", 1.0), "peak MB": ("peak_bytes", 1e6)}
    lines = [f"| quantizing {MODEL} | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, rows in turns.items():
        cells = [f"{median(r[key] for r in rows) / unit:.1f}" for key, unit in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    first, second = turns.values()
    ratios = [f"{_ratio(first, second, key):.2f}" for key, _ in columns.values()]
    lines.append(f"| ratio, median of {len(first)} pairs | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _ratio(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], key: str) -> float:
    return median(a[key] / b[key] for a, b in zip(first, second, strict=True))
