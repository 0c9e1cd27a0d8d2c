"""Cross-layer equalization behind a gate: kept only where it lowers the error on samples that it has not seen.

The pass predicts noise as if rounding errors were independent; in networks where they are not it can lose. So the model
is quantized with and without it from one half of the samples, and the other half decides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

import numpy as np
import onnx_ir as ir

from bitwright.compiler import frontend, quantizing
from bitwright.compiler.calibrate.channels import collect_channels
from bitwright.compiler.calibrate.stream import Dataset
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.ort.layer_error import layer_errors
from bitwright.compiler.ort.session import local_config
from bitwright.compiler.plan.planner import RuntimeName, observed_tensors
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.shape_choice import static_shapes
from bitwright.passes.contract import PassResult
from bitwright.passes.equalize_layers import EqualizeLayers, tensors_to_observe
from bitwright.targets.schema import SHORT_FORMATS

Observe = Callable[[Compilation, Selection], None]

FEWEST_SAMPLES = 8
# So many samples quantize the two models that are compared, and so many judge them.
TRIALS = 64
JUDGES = 128
WORTHWHILE_DB = 1.0


class EveryOther:
    """Every second sample of a dataset, at most so many."""

    def __init__(self, dataset: Dataset, start: int, most: int | None = None) -> None:
        self._dataset, self._start = dataset, start
        count = (len(dataset) - start + 1) // 2
        self._count = count if most is None else min(most, count)

    def __len__(self) -> int:
        return self._count

    def batches(self, size: int) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield the samples one by one, whatever the wanted size."""
        del size  # samples are joined by the dataset itself, which cannot leave out every other one
        every_other = islice(self._dataset.batches(1), self._start, None, 2)
        return islice(every_other, self._count)


def equalize(c: Compilation, runtime: RuntimeName, observe_inputs: Observe) -> PassResult:
    """Equalize ``c.model`` in place if that helps.

    Args:
        c: Has a model, its selection, and samples.
        runtime: Which of the two runtimes it is quantized for.
        observe_inputs: Collects what rounding needs to know of a model's inputs.
    """
    assert c.model is not None and c.selection is not None and c.dataset is not None
    samples = frontend.samples_of(c)
    quantized = frozenset(observed_tensors(c.selection))
    tensors = tensors_to_observe(c.model, quantized)
    if not tensors:
        return PassResult(c.model, 0, ("nothing to equalize",))
    if len(samples) < FEWEST_SAMPLES:
        return PassResult(
            c.model, 0, (f"left out: fewer than {FEWEST_SAMPLES} samples cannot tell whether it helps",)
        )
    seen = EveryOther(samples, 0)
    statistics = collect_channels(c.model, seen, tensors, threads=c.options.threads)
    candidate = c.model.clone()
    result = EqualizeLayers(statistics, quantized, largest=_largest_integer(c)).run(candidate)
    if not result.changed:
        return PassResult(c.model, 0, result.notes)
    before = unseen_quality(c, runtime, c.model, samples, observe_inputs)
    after = unseen_quality(c, runtime, candidate, samples, observe_inputs)
    gain = sum(after[name] - before[name] for name in before) / len(before)
    verdict = f"mean gain of the outputs and the last layer on unseen samples {gain:+.1f} dB"
    if gain < WORTHWHILE_DB:
        return PassResult(c.model, 0, (f"not kept: {verdict}", *result.notes))
    c.model = candidate
    return PassResult(candidate, result.changed, (f"kept: {verdict}", *result.notes))


def _largest_integer(c: Compilation) -> int:
    """Return the largest integer of the narrowest weights that the recipe may choose for convolutions."""
    return min((SHORT_FORMATS[f] for f in c.recipe.recipe.formats if f in SHORT_FORMATS), default=127)


def unseen_quality(
    c: Compilation,
    runtime: RuntimeName,
    model: ir.Model,
    samples: Dataset,
    observe_inputs: Observe,
    *,
    first: int = 0,
) -> dict[str, float]:
    """Quantize a model from one half of the samples; return how exact outputs and last layer are on the other, in dB.

    Magnitudes of errors are compared, not squares: behind a Softmax a few samples between two classes would decide.

    Args:
        c: Has a selection; its options say how ranges are chosen.
        runtime: Which of the two runtimes the model is quantized for.
        model: A float model.
        samples: All samples.
        observe_inputs: Collects what rounding needs to know of a model's inputs.
        first: 0: the first, third, ... sample calibrate, the others judge; 1: the other way round.
    """
    trial = copy.copy(c)
    trial.model, trial.shapes = model, static_shapes(model, c.dims)
    trial.dataset = EveryOther(samples, first, TRIALS)  # type: ignore[assignment]
    trial.statistics, trial.moments = {}, {}
    trial.selection = frontend.reselect(trial, runtime)
    frontend.calibrate(trial, observed_tensors(trial.selection), [])
    observe_inputs(trial, trial.selection)
    plan = quantizing.with_searched_scales(trial, frontend.allocate(trial, trial.selection, runtime))
    quantized = quantizing.quantized_model(trial, plan)
    layers = [
        u.output.name or ""
        for u in trial.selection.units
        if u in trial.selection.integer and u.role == "anchor"
    ]
    judges = list(EveryOther(samples, 1 - first, JUDGES).batches(1))
    config = local_config(c.profile.runtimes.onnxruntime)
    return layer_errors(model, quantized, layers[-1:], judges, config=config, power=1)
