"""Tables and picture of the allocation benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]
# Measured times of one file differ by as much from one set of sessions to the next.
SAME_TIME, SAME_SIZE, SAME_LOSS = 0.03, 0.002, 0.02
EXACT = 1e-12
COSTS = {"latency": ("seconds", SAME_TIME), "size": ("size", SAME_SIZE)}


def tables(results: Sequence[Row], solver: Row) -> str:
    """Return everything as Markdown."""
    parts = [_prediction(results), _all_predictions(results), _domination(results), _solver(solver)]
    parts += [_plans(r) for r in results if any(row["kind"].startswith("front") for row in r["rows"])]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *(f"| {' | '.join(r)} |" for r in rows)]
    return "\n".join(lines)


def _uniform(result: Row, fmt: str) -> Row:
    return next(r for r in result["rows"] if r["name"] == f"uniform {fmt}")


def _prediction(results: Sequence[Row]) -> str:
    """The chosen plan: predicted and measured seconds, absolute and relative to float."""

    def rows() -> Iterator[Sequence[str]]:
        for r in results:
            plan, flt = next(x for x in r["rows"] if x["kind"] == "chosen"), _uniform(r, "float")
            ratio = plan["seconds"] / plan["predicted_s"]
            relative = ratio / (flt["seconds"] / flt["predicted_s"])
            yield (
                r["model"],
                plan["name"],
                f"{plan['predicted_s'] * 1e6:.0f}",
                f"{plan['seconds'] * 1e6:.0f}",
                f"{ratio:.2f}",
                f"{relative:.2f}",
            )

    head = (
        "model",
        "budget",
        "predicted us",
        "measured us",
        "measured / predicted",
        "the same, relative to float",
    )
    return _table(head, rows())


def _all_predictions(results: Sequence[Row]) -> str:
    """Measured over predicted seconds of every plan that was built."""

    def rows() -> Iterator[Sequence[str]]:
        for r in results:
            unique = {x["file"]: x for x in r["rows"] if x["predicted_s"]}
            ratios = sorted(x["seconds"] / x["predicted_s"] for x in unique.values())
            inside = sum(0.8 <= q <= 1.2 for q in ratios)
            middle = ratios[len(ratios) // 2]
            yield (
                r["model"],
                str(len(ratios)),
                f"{ratios[0]:.2f}",
                f"{middle:.2f}",
                f"{ratios[-1]:.2f}",
                f"{inside}",
            )

    head = ("model", "plans built", "least measured / predicted", "median", "largest", "within 20 %")
    return _table(head, rows())


def verdict(row: Row, front: Sequence[Row], cost: str, same: float) -> str:
    """Say whether a point of a measured front is as cheap and loses no more, within what measurements tell apart."""
    if any(p["file"] == row["file"] for p in front):
        return "is on the front"
    as_cheap = [p for p in front if p[cost] <= row[cost] * (1 + same)]
    better = [p for p in as_cheap if p["loss"] <= row["loss"] * (1 + SAME_LOSS)]
    if better:
        best = min(better, key=lambda p: p["loss"])
        share = best["loss"] / row["loss"]
        gain = f"{share:.2g} of its loss" if best["loss"] > EXACT else "which loses nothing"
        return f"dominated by {best['name']}, {gain}"
    if not as_cheap:
        return "**not dominated**: cheaper than the front's first point"
    best = min(as_cheap, key=lambda p: p["loss"])
    return (
        f"**not dominated**: {best['name']} has {best['loss'] / max(row['loss'], 1e-30):.2g} times its loss"
    )


def _compared(result: Row, label: str) -> Iterator[tuple[Row, str]]:
    cost, same = COSTS[label]
    front = [x for x in result["rows"] if x["kind"] == f"front {label}"]
    seen = set()
    for row in result["rows"]:
        other = row["kind"] == "uniform" or row["kind"] == f"greedy {label}"
        if front and other and row["file"] not in seen:
            seen.add(row["file"])
            yield row, verdict(row, front, cost, same)


def _domination(results: Sequence[Row]) -> str:
    """Every uniform format, and greedy selection in one row, against the measured fronts."""

    def rows() -> Iterator[Sequence[str]]:
        for r in results:
            for label in COSTS:
                verdicts = list(_compared(r, label))
                for row, text in verdicts:
                    if row["kind"] == "uniform":
                        yield r["model"], label, row["name"], text
                greedy = [(row, text) for row, text in verdicts if row["kind"].startswith("greedy")]
                count = {k: sum(k in text for _, text in greedy) for k in ("is on the front", "dominated by")}
                rest = [f"{row['name']}: {text}" for row, text in greedy if text.startswith("**")]
                if greedy:
                    same, below = count["is on the front"], count["dominated by"]
                    text = f"{below} of {len(greedy)} plans dominated, {same} are the front's own"
                    yield r["model"], label, "greedy", "; ".join([text, *rest])

    return _table(("model", "cost", "plan", "against the measured front"), rows())


def _solver(solver: Row) -> str:
    rows = (
        (
            f"{r['share']:.0%}",
            f"{r['wall_s']:.2f}",
            f"{r['cpu_s']:.2f}",
            f"{r['gap']:.1e}",
            f"{r['loss']:.5g}",
            "stuck" if r["greedy_loss"] is None else f"{r['greedy_loss']:.5g}",
        )
        for r in solver["rows"]
    )
    title = f"budget ({solver['groups']} groups, 5 formats, {solver['boundaries']} boundaries)"
    return _table((title, "wall s", "CPU s", "gap", "loss", "greedy's loss"), iter(rows))


def _plans(result: Row) -> str:
    """All plans of a model."""

    def number(value: float | None, unit: float, digits: str) -> str:
        return "" if value is None else format(value * unit, digits)

    def rows() -> Iterator[Sequence[str]]:
        for row in result["rows"]:
            yield (
                row["name"],
                number(row["predicted_s"], 1e6, ".0f"),
                f"{row['seconds'] * 1e6:.0f}",
                f"{row['size'] / 1e3:.1f}",
                number(row["predicted_loss"], 1.0, ".3g"),
                f"{row['loss']:.3g}",
                f"{row['metric']:.4f}",
            )

    head = (
        "plan",
        "predicted us",
        "measured us",
        "file kB",
        "predicted loss",
        "measured loss",
        result["metric"],
    )
    return f"### {result['model']}, float {result['float_metric']:.4f}\n\n" + _table(head, rows())


def _panel(axes: Axes, result: Row, label: str) -> None:
    cost, _ = COSTS[label]
    unit = 1e3 if label == "latency" else 1e-6
    exact = [x["loss"] for x in result["rows"] if x["loss"] > 0]
    floor = min(exact) / 3

    def points(kind: str) -> tuple[list[float], list[float]]:
        chosen = sorted((x[cost] * unit, max(x["loss"], floor)) for x in result["rows"] if x["kind"] == kind)
        return [x for x, _ in chosen], [y for _, y in chosen]

    axes.step(*points(f"front {label}"), where="post", color="#1f6f8b", linewidth=1)
    axes.plot(*points(f"front {label}"), "o", color="#1f6f8b", markersize=5, label="front of the allocator")
    axes.plot(*points(f"greedy {label}"), "x", color="#c8553d", markersize=5, label="greedy, same budgets")
    axes.plot(*points("uniform"), "D", color="#6a994e", markersize=4, label="one format everywhere")
    for row in result["rows"]:
        if row["kind"] == "uniform":
            at = (row[cost] * unit, max(row["loss"], floor))
            axes.annotate(
                row["name"].removeprefix("uniform "),
                at,
                fontsize=6,
                xytext=(3, 3),
                textcoords="offset points",
            )
    axes.set_yscale("log")
    axes.set_title(result["model"], fontsize=9)
    axes.set_xlabel("measured ms" if label == "latency" else "file MB", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def draw(results: Sequence[Row], path: Path) -> None:
    """Draw the measured fronts, one column a model; nothing where there are none."""
    if not results:
        return
    figure, grid = plt.subplots(2, len(results), figsize=(3.6 * len(results), 6.4), squeeze=False)
    for column, result in enumerate(results):
        for row, label in enumerate(COSTS):
            _panel(grid[row][column], result, label)
    grid[0][0].set_ylabel("noise / signal of the outputs", fontsize=8)
    grid[1][0].set_ylabel("noise / signal of the outputs", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    with plt.rc_context({"svg.hashsalt": "bitwright"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
