"""The tables: ratios with intervals for every model, geometric means, and what was not met."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitwright.compiler.bench.statistics import Interval, geometric_mean, ratio_of_medians

# Targets and the bounds that are claimed: geometric mean, largest.
BOUNDS = {"host": (0.50, 0.90), "x86-avx512-vnni": (0.90, 1.10)}
BUSY_PER_S = 50.0
# Rivals that must do without AMX, and targets that do not.
WITHOUT_AMX = ", no AMX"
TILED = ("host", "x86-amx")


def fastest_rival(result: Mapping[str, Any], suffix: str = "") -> str | None:
    """Return the label of ONNX Runtime's fastest form: of those with AMX, or of those that end in ``suffix``."""
    rivals = {
        k: v["median_s"]
        for k, v in result["contestants"].items()
        if v["kind"] == "onnxruntime" and k.endswith(WITHOUT_AMX) == bool(suffix)
    }
    return min(rivals, key=rivals.__getitem__, default=None)


def ratio(result: Mapping[str, Any], target: str, rival: str) -> Interval:
    """Return the time of a target's artifact over that of a rival."""
    ours, theirs = (np.array(result["contestants"][k]["medians"]) for k in (target, rival))
    return ratio_of_medians(ours, theirs)


def targets_of(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return all targets that were measured, in order."""
    found = (k for r in results for k, v in r["contestants"].items() if v["kind"] == "artifact")
    return list(dict.fromkeys(found))


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return one table for each number of threads."""
    parts = []
    for threads in sorted({r["threads"] for r in results}):
        chosen = [r for r in results if r["threads"] == threads]
        parts.append("\n".join(_table(chosen, threads)))
    return "\n\n".join(parts) + "\n"


def _columns(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return (target, suffix of the rivals): what has no AMX meets ONNX Runtime with and without it."""
    limited = any(k.endswith(WITHOUT_AMX) for r in results for k in r["contestants"])
    columns = []
    for target in targets_of(results):
        columns.append((target, ""))
        if limited and target.removesuffix("+tuned") not in TILED:
            columns.append((target, WITHOUT_AMX))
    return columns


def _table(results: Sequence[Mapping[str, Any]], threads: int) -> Iterator[str]:
    columns = _columns(results)
    heads = [t + (" (ONNX Runtime without AMX)" if suffix else "") for t, suffix in columns]
    yield f"{'One thread' if threads == 1 else f'{threads} threads'}, {_clock(results)}:\n"
    yield f"| model | what | ONNX Runtime's fastest | us | {' | '.join(heads)} |"
    yield "| --- " * (4 + len(columns)) + "|"
    ratios: dict[tuple[str, str], list[float]] = {column: [] for column in columns}
    for result in results:
        cells = [
            _cell(result, target, fastest_rival(result, suffix), ratios[target, suffix])
            for target, suffix in columns
        ]
        rival = fastest_rival(result)
        seconds = result["contestants"][rival]["median_s"]
        yield f"| {result['model']} | {result['what']} | {rival} | {seconds * 1e6:.0f} | {' | '.join(cells)} |"
    means = [f"**{geometric_mean(found):.3f}**" if (found := ratios[c]) else "" for c in columns]
    largest = [f"{max(found):.3f}" if (found := ratios[c]) else "" for c in columns]
    yield f"| **geometric mean** | {len(results)} models | | | {' | '.join(means)} |"
    yield f"| largest | | | | {' | '.join(largest)} |"
    yield ""
    yield from _remarks(results, dict(zip(heads, ratios.values(), strict=True)), columns)


def _cell(result: Mapping[str, Any], target: str, rival: str | None, ratios: list[float]) -> str:
    """Return a ratio with its interval and note it."""
    if target not in result["contestants"]:
        return "not compiled"
    if rival is None:
        return "not measured"
    found = ratio(result, target, rival)
    ratios.append(found.value)
    return f"{found.value:.3f} ({found.low:.2f} to {found.high:.2f}){'' if found.shows_difference else ' ='}"


def _clock(results: Sequence[Mapping[str, Any]]) -> str:
    clock = "processor time" if results[0]["clock"] == "thread" else "wall time"
    return f"{clock} of the artifact over that of ONNX Runtime's fastest form; '=': no difference shown"


def _remarks(
    results: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, list[float]],
    columns: Sequence[tuple[str, str]],
) -> Iterator[str]:
    for (target, _), (head, found) in zip(columns, ratios.items(), strict=True):
        mean, most = BOUNDS.get(target.removesuffix("+tuned"), (None, None))
        if mean is None or most is None or not found:
            continue
        over = sum(r > most for r in found)
        met = "met" if geometric_mean(found) <= mean and not over else "not met"
        yield f"- {head}: geometric mean at most {mean:.2f}, none above {most:.2f}: {met} ({over} above)."
    for target, found in ratios.items():
        tuned = ratios.get(f"{target}+tuned", [])
        if tuned and len(tuned) == len(found):
            yield f"- {target}: untuned takes {geometric_mean(np.divide(found, tuned)):.2f} of the tuned time."
    busy = [r["model"] for r in results if r["surroundings"]["preempted"] > BUSY_PER_S]
    if busy:
        yield f"- Other work ran on the machine during {len(busy)} of {len(results)} measurements."
    for failed in (f for r in results for f in r["failures"]):
        yield f"- {failed['what']}: {failed['why']}"
