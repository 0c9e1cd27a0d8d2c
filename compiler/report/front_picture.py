"""The Pareto front as a picture of its own: loss against a cost, with whatever it is compared to."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

WIDTH_IN, HEIGHT_IN = 9.2, 4.6
# Losses further apart than this are drawn by their logarithm.
DECADES = 30.0
AXES = {
    "loss": ("predicted loss", 1.0),
    "latency_s": ("latency in ms", 1e3),
    "weight_bytes": ("weights in MB", 1e-6),
    "peak_ram_bytes": ("peak RAM in kB", 1e-3),
    "energy_j": ("energy in mJ", 1e3),
}
COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#8e6c8a", "#b08968")


def front_picture(
    front: Sequence[tuple[float, float]],
    *,
    cost: str = "latency_s",
    others: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    measured: bool = False,
) -> str:
    """Return an SVG; the same points give the same bytes.

    Args:
        front: (cost, loss) of each point of the front, in base units.
        cost: Name of the metric on the horizontal axis, a key of ``AXES``.
        others: Label -> points to compare with, e.g. uniform formats or greedy selection.
        measured: The losses are those of real models, and bytes are those of their files.
    """
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    label, unit = AXES[cost]
    label = label.replace("weights", "file") if measured else label
    points = sorted(front)
    xs, ys = [x * unit for x, _ in points], [y for _, y in points]
    # Between two points the front is a stair: nothing cheaper has the smaller loss.
    axes.step(xs, ys, where="post", color=COLOURS[0], linewidth=1.5)
    axes.plot(xs, ys, "o", color=COLOURS[0], markersize=5, label="front" if measured else "exact optimum")
    for colour, (name, compared) in zip(
        COLOURS[1:] * (len(others or {})), (others or {}).items(), strict=False
    ):
        axes.plot(
            [x * unit for x, _ in compared],
            [y for _, y in compared],
            "D",
            color=colour,
            markersize=5,
            label=name,
        )
    positive = [y for series in (front, *(others or {}).values()) for _, y in series if y > 0]
    if positive and max(positive) > DECADES * min(positive):
        # Zero has its place below the smallest loss that is not.
        axes.set_yscale("symlog", linthresh=min(positive))
        axes.set_ylim(bottom=0.0)
    axes.set_xlabel(label)
    axes.set_ylabel("measured loss" if measured else AXES["loss"][0])
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if others:
        axes.legend(frameon=False)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "bitwright", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
