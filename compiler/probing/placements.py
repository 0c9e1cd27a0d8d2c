"""The placements of a model that are measured: all float, everything in one format, every second layer in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from bitwright.compiler import frontend, quantizing
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.ingest.dataset import random_dataset
from bitwright.compiler.options import Options
from bitwright.compiler.plan.latency import crossings
from bitwright.compiler.plan.planner import observed_tensors, plan_selection
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.units import FormatChoice
from bitwright.compiler.probing.observe import Placed
from bitwright.compiler.shape_choice import samples_of_shape
from bitwright.targets.schema import Profile

# Ranges only have to be plausible: they do not change the time.
CALIBRATION_SAMPLES = 2
# A kernel is slower among kernels of another format, which share its caches, and plans are mostly of one format: a call
# counts more where its format is everywhere.
UNIFORM_WEIGHT = 3.0
SEARCHED_SAMPLES = 256


@dataclass(frozen=True)
class Wish:
    """A placement to be measured.

    Attributes:
        label: What it is, in words.
        formats: Which formats the nodes may run in.
        keep_float: Anchors that stay in float.
        weight: How much its calls count against equal ones in other placements.
    """

    label: str
    formats: FormatChoice
    keep_float: frozenset[str] = frozenset()
    weight: float = 1.0


def wishes(c: Compilation) -> Iterator[Wish]:
    """Yield the placements whose measurements tell every site's time in every format, and what borders cost."""
    table = c.profile.runtimes.onnxruntime
    yield Wish("float", uniform("float"), weight=UNIFORM_WEIGHT)
    for fmt in table.formats():
        choice = uniform(fmt)
        selection = _select(c, choice, frozenset())
        if fmt not in table.float_formats and not selection.integer:
            continue  # nothing in the model has a kernel for it
        yield Wish(fmt, choice, weight=UNIFORM_WEIGHT)
        anchors = [u.name for u in selection.units if u in selection.integer and u.role == "anchor"]
        if len(anchors) < 2 or not crossings(selection):
            continue
        for number, first in enumerate((0, 1), start=1):
            kept = frozenset(anchors[first::2])
            yield Wish(f"{fmt}, every second layer in float ({number})", choice, kept)


def uniform(fmt: str) -> FormatChoice:
    """Return the choice of one format for everything that has a kernel for it."""
    if fmt == "float":
        return FormatChoice(("float",), ("float",), ("float",))
    others = (fmt, "int8") if fmt in ("fp16", "bf16") else ("int8",)
    return FormatChoice((fmt,), others, ("int8",))


def prepare(
    profile: Profile, model: Path, *, data: str | None, dims: Mapping[str, int], threads: int
) -> Compilation:
    """Read and normalize a model and choose the sizes to measure at.

    Args:
        profile: The target.
        model: The ONNX file.
        data: Samples as the command line names them; None makes random ones.
        dims: Sizes of dynamic dimensions.
        threads: Threads for calibration.

    Raises:
        BitwrightError: The model or the data is refused.
    """
    options = Options(
        model=model,
        target=profile.name,
        data=data,
        random_data=data is None,
        samples=CALIBRATION_SAMPLES,
        method="minmax",
        dims=dims,
        threads=threads,
        golden=1,
    )
    c = Compilation(options, profile)
    frontend.ingest(c, [])
    assert c.source is not None
    if data is None:
        c.dataset = random_dataset(c.source.model, CALIBRATION_SAMPLES, seed=0, dims=dims)
    frontend.normalize_model(c, [])
    frontend.choose_shapes(c, [])
    return c


def feeds_of(c: Compilation) -> Mapping[str, np.ndarray]:
    """Return one sample of the sizes that are measured at."""
    assert c.dataset is not None and c.model is not None
    return samples_of_shape(c.model, islice(c.dataset.batches(1), SEARCHED_SAMPLES), c.dims, 1)[0]


def place(c: Compilation, wish: Wish, feeds: Mapping[str, np.ndarray]) -> Placed:
    """Build the model of a placement.

    Raises:
        BitwrightError: The format cannot be built for this model.
    """
    assert c.model is not None
    selection = _select(c, wish.formats, wish.keep_float)
    frontend.calibrate(c, observed_tensors(selection), [])
    plan = frontend.allocate(c, selection, "onnxruntime")
    model = quantizing.draft_model(c, plan)
    return Placed(wish.label, selection, model, c.shapes, feeds, wish.weight)


def _select(c: Compilation, formats: FormatChoice, keep: frozenset[str]) -> Selection:
    assert c.model is not None
    return plan_selection(c.model, c.profile, "onnxruntime", c.shapes, keep_float=keep, formats=formats)
