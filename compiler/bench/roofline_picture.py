"""The roofline as a picture: kernels as points under the ceilings of instructions and memory."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bitwright.compiler.bench.ceilings import Ceilings
from bitwright.compiler.bench.roofline import KernelPoint, Roofline

WIDTH_IN, HEIGHT_IN = 9.2, 5.2
COLOURS = ("#1f6f8b", "#c8553d", "#6a994e", "#8e6c8a", "#b08968")
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "<", ">", "p")
# Points are between these areas, by their share of the bundle's time.
SMALLEST, LARGEST = 10.0, 120.0
MARGIN = 2.0


def roofline_picture(found: Sequence[Roofline]) -> str:
    """Return an SVG; the same figures give the same bytes.

    Every point is a kernel, its area its share of the time of its bundle; colours are instructions, markers bundles.

    Args:
        found: Bundles measured on one machine with one number of threads; at least one with a kernel.
    """
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    points = [k for r in found for k in r.kernels]
    ceilings = found[0].ceilings
    names = list(dict.fromkeys([*ceilings.instructions, *(k.intrinsic for k in points)]))
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    span = min(k.intensity for k in points) / MARGIN, max(k.intensity for k in points) * MARGIN
    bottom = min(k.gops for k in points) / MARGIN
    _roofs(axes, ceilings, colours, span, bottom)
    for number, roofline in enumerate(found):
        _scatter(axes, roofline, colours, MARKERS[number % len(MARKERS)])
    _dress(axes, ceilings, points, span, bottom)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "bitwright", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _roofs(
    axes: Axes, ceilings: Ceilings, colours: dict[str, str], span: tuple[float, float], bottom: float
) -> None:
    """Draw what memory and instructions allow, each with its name where its line enters the picture."""
    low, high = span
    best = max(row.cached for row in ceilings.instructions.values()) * 1e-9
    for level in ceilings.levels:
        rate = level.bytes_per_s * 1e-9
        ends = np.array([max(low, bottom / rate), min(high, best / rate)])
        if ends[0] >= ends[1]:
            continue
        axes.plot(ends, ends * rate, color="#999999", linewidth=1)
        label, start = f"{level.name} {rate:.0f} GB/s", (ends[0], ends[0] * rate)
        axes.annotate(label, start, xytext=(4, 6), textcoords="offset points", color="#666666", fontsize=8)
    for name, row in ceilings.instructions.items():
        top = row.cached * 1e-9
        axes.plot([low, high], [top, top], color=colours[name], linewidth=1.2, linestyle="--")
        axes.annotate(
            f"{name} {top:.0f} GOPS",
            (low, top),
            xytext=(4, 4),
            textcoords="offset points",
            color=colours[name],
            fontsize=8,
        )


def _scatter(axes: Axes, roofline: Roofline, colours: dict[str, str], marker: str) -> None:
    """Draw the kernels of one bundle, one group (with an id of its own) for each instruction."""
    total = sum(k.seconds for k in roofline.kernels)
    for name in dict.fromkeys(k.intrinsic for k in roofline.kernels):
        chosen = [k for k in roofline.kernels if k.intrinsic == name]
        axes.scatter(
            [k.intensity for k in chosen],
            [k.gops for k in chosen],
            s=[SMALLEST + (LARGEST - SMALLEST) * k.seconds / total for k in chosen],
            color=colours[name],
            marker=marker,
            alpha=0.7,
            linewidths=0,
            label=f"{roofline.label}: {name}",
            gid=f"kernels-{roofline.label}-{name}",
        )


def _dress(
    axes: Axes, ceilings: Ceilings, points: Sequence[KernelPoint], span: tuple[float, float], bottom: float
) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*span)
    top = max(row.cached for row in ceilings.instructions.values()) * 1e-9
    axes.set_ylim(bottom, max(top, *(k.gops for k in points)) * MARGIN)
    threads = "one thread" if ceilings.threads == 1 else f"{ceilings.threads} threads"
    axes.set_title(f"{ceilings.machine}, {threads}", loc="left", fontsize=9)
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("billions of operations per second")
    axes.grid(visible=True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="lower right", ncols=2)
