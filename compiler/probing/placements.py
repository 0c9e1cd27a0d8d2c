"""The placements of a model that are measured: all float, everything in one format, every second layer in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bitwright.compiler import frontend
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.plan.planner import observed_tensors, plan_selection
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.units import FormatChoice
from bitwright.compiler.probing.observe import Placed


@dataclass(frozen=True)
class Wish:
    """A placement to be measured.

    Attributes:
        label: What it is, in words.
        formats: Which formats the nodes may run in.
        keep_float: Anchors that stay in float.
    """

    label: str
    formats: FormatChoice
    keep_float: frozenset[str] = frozenset()


def wishes(c: Compilation) -> Iterator[Wish]:
    """Yield the placements whose measurements tell every site's time in every format, and what borders cost."""
    table = c.profile.runtimes.onnxruntime
    yield Wish("float", FormatChoice(("float",), ("float",), ("float",)))
    for fmt in table.formats():
        choice = uniform(fmt)
        yield Wish(fmt, choice)
        anchors = _anchors(c, choice)
        if len(anchors) < 2 or fmt in table.float_formats:
            continue
        for first in (0, 1):
            kept = frozenset(anchors[first::2])
            yield Wish(f"{fmt}, every second layer in float", choice, kept)


def uniform(fmt: str) -> FormatChoice:
    """Return the choice of one format for everything that has a kernel for it."""
    others = (fmt, "int8") if fmt in ("fp16", "bf16") else ("int8",)
    return FormatChoice((fmt,), others, ("int8",))


def place(c: Compilation, wish: Wish) -> Placed:
    """Build the model of a placement.

    Raises:
        BitwrightError: The format cannot be built for this model.
    """
    assert c.model is not None
    selection = _select(c, wish.formats, wish.keep_float)
    frontend.calibrate(c, observed_tensors(selection), [])
    plan = frontend.allocate(c, selection, "onnxruntime")
    model = frontend.quantized_model(c, plan)
    return Placed(wish.label, selection, model, c.shapes, _feeds(c))


def _select(c: Compilation, formats: FormatChoice, keep: frozenset[str]) -> Selection:
    assert c.model is not None
    return plan_selection(c.model, c.profile, "onnxruntime", c.shapes, keep_float=keep, formats=formats)


def _anchors(c: Compilation, formats: FormatChoice) -> list[str]:
    selection = _select(c, formats, frozenset())
    return [u.name for u in selection.units if u in selection.integer and u.role == "anchor"]


def _feeds(c: Compilation) -> Mapping[str, np.ndarray]:
    assert c.dataset is not None
    return next(iter(c.dataset.batches(1)))
