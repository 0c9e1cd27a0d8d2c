"""Accuracy over time of everyone, one panel a model."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from quantization.competitors import ALL
from quantization.results import Results
from quantization.table import measured

# Tool by the start of a competitor's name: label, colour, marker. Colours are told apart by colour-blind readers, too.
TOOLS = {
    "bitwright": ("Bitwright", "#d55e00", "*"),
    "ort-static": ("ONNX Runtime static", "#0072b2", "o"),
    "ort-dynamic": ("ONNX Runtime dynamic", "#56b4e9", "v"),
    "ort-nbits": ("ONNX Runtime MatMulNBits", "#009e73", "s"),
    "nncf": ("NNCF", "#cc79a7", "D"),
    "tflite": ("TensorFlow Lite", "#666666", "x"),
}
COLUMNS = 4
PANEL_INCHES = 3.1


def tool_of(name: str) -> str:
    """Return the key of :data:`TOOLS` that a competitor belongs to."""
    return next(key for key in TOOLS if name.startswith(key))


def _panel(axes: Axes, model: str, results: Results) -> None:
    for competitor, row in measured(results, model):
        label, colour, marker = TOOLS[tool_of(competitor.name)]
        ratio = next(iter(row["time"].values()))["ratio"]
        if math.isfinite(row["sqnr_db"]):
            size = 90 if competitor.is_ours else 28
            axes.scatter(ratio, row["sqnr_db"], s=size, c=colour, marker=marker, label=label, zorder=3)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks := [0.25, 0.5, 1, 2, 4, 8, 16], [f"{t:g}" for t in ticks], fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title(model, fontsize=9)
    axes.grid(alpha=0.25)


def draw(results: Results, path: Path) -> None:
    """Write the picture.

    Args:
        results: Everything measured.
        path: The .svg file.
    """
    models = [m for m in ALL if measured(results, m)]
    rows = math.ceil(len(models) / COLUMNS)
    figure, grid = plt.subplots(
        rows, COLUMNS, figsize=(PANEL_INCHES * COLUMNS, PANEL_INCHES * rows), squeeze=False
    )
    panels = list(grid.flat)
    for axes, model in zip(panels, models, strict=False):
        _panel(axes, model, results)
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    found = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.supxlabel("time / fp32 in ONNX Runtime, one thread (left is faster)", fontsize=9)
    figure.supylabel("output SQNR on held-out data, dB (up is better)", fontsize=9)
    figure.legend(
        found.values(), found.keys(), loc="upper center", ncols=len(TOOLS), fontsize=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    # No date and fixed ids: the same results give the same file.
    with plt.rc_context({"svg.hashsalt": "bitwright"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
