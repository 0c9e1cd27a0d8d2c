"""The phases that ``compile`` and ``quantize`` share: from a file nobody vouches for to an audited Q/DQ model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import numpy as np
import onnx_ir as ir

from bitwright.compiler.calibrate.methods import Method, parse_method, range_from
from bitwright.compiler.calibrate.stream import collect
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import InternalError, UsageError, nearest
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.ingest.dataset import Dataset, dataset_from_memory, open_dataset, random_dataset
from bitwright.compiler.ingest.evaluator import load_eval
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ort.accuracy import check_drop, measure
from bitwright.compiler.ort.audit import audit
from bitwright.compiler.ort.equality import relative_difference
from bitwright.compiler.ort.layer_error import layer_errors
from bitwright.compiler.ort.session import SessionConfig, config_for
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.planner import (
    Ranges,
    RuntimeName,
    make_plan,
    observed_tensors,
    plan_selection,
    runtime_of,
)
from bitwright.compiler.plan.quantizers import levels_of
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.shape_choice import choose_dims, static_shapes
from bitwright.passes.insert_qdq import InsertQDQ
from bitwright.passes.normalize import normalize
from bitwright.passes.quantize_tables import QuantizeTables
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_nearest import RoundNearest

# Folding BatchNorm and biases reorders float32 sums; a real mistake shows up as errors of order one.
NORMALIZE_BOUND = 1e-3
RANDOM_SAMPLES = 8
ERROR_SAMPLES = 4


def ingest(c: Compilation, notes: list[str]) -> None:
    """Read and check the model, then open the data against it."""
    c.source = read_model(c.options.model)
    notes.extend(c.source.warnings)
    c.dataset = _open_data(c)
    notes.extend(c.dataset.warnings)
    if c.options.evaluate is not None:
        load_eval(c.options.evaluate)  # refuse a wrong metric before any work is done


def _open_data(c: Compilation) -> Dataset:
    assert c.source is not None
    data = c.options.data
    if data is None:
        return random_dataset(c.source.model, RANDOM_SAMPLES, seed=0)
    if isinstance(data, str):
        return open_dataset(data, c.source.model)
    return dataset_from_memory(data, c.source.model)


def normalize_model(c: Compilation, notes: list[str]) -> None:
    """Bring the model into normal form and check that it still computes the same."""
    assert c.source is not None and c.dataset is not None
    original = c.source.model
    c.model = original.clone()
    runtime = runtime_of(c.profile, "artifact")
    notes.extend(normalize(c.model, runtime.opset).notes)
    sample = next(iter(c.dataset.batches(1)))
    difference = relative_difference(original, c.model, sample, threads=c.options.threads)
    notes.append(f"largest relative difference to the input model: {difference:.2e}")
    if difference > NORMALIZE_BOUND:
        msg = f"normalization changed the model's outputs by {difference:.2e} (allowed {NORMALIZE_BOUND:.0e})"
        raise InternalError(
            msg,
            where=str(c.options.model),
            fix="please report this model; --dump DIR keeps the normalized form",
        )


def choose_shapes(c: Compilation, notes: list[str]) -> None:
    """Choose the sizes of dynamic dimensions to plan for: the user's, else the most frequent in the data."""
    assert c.model is not None and c.dataset is not None
    c.dims = choose_dims(c.model, c.dataset.batches(1), c.options.dims)
    c.shapes = static_shapes(c.model, c.dims)
    if c.dims:
        notes.append("planned for " + ", ".join(f"{k}={v}" for k, v in c.dims.items()))


def select_units(c: Compilation, runtime: RuntimeName) -> Selection:
    """Choose what runs on integers in one of the two runtimes."""
    assert c.model is not None
    _check_names(c)
    return plan_selection(c.model, c.profile, runtime, c.shapes, keep_float=c.options.keep_float)


def _check_names(c: Compilation) -> None:
    assert c.model is not None
    names = [node_label(node) for node in c.model.graph]
    for name in c.options.keep_float:
        if name not in names:
            msg = f"the model has no node '{name}'"
            raise UsageError(msg, where="--keep-float", fix=nearest(name, names))


class Limited:
    """The first samples of a dataset."""

    def __init__(self, dataset: Dataset, samples: int) -> None:
        self._dataset, self._samples = dataset, samples

    def __len__(self) -> int:
        return min(self._samples, len(self._dataset))

    def batches(self, size: int) -> islice[dict[str, np.ndarray]]:
        """Yield batches that hold at most the wanted samples."""
        size = min(size, self._samples)
        return islice(self._dataset.batches(size), self._samples // size)


def calibrate(c: Compilation, tensors: tuple[str, ...], notes: list[str]) -> None:
    """Learn activation ranges in one streaming pass."""
    assert c.model is not None and c.dataset is not None
    missing = tuple(t for t in tensors if t not in c.statistics)
    if not missing:
        return
    data = c.dataset if c.options.samples is None else Limited(c.dataset, c.options.samples)
    c.statistics |= collect(
        c.model,
        data,
        missing,
        method=parse_method(c.options.method),
        threads=c.options.threads,
        progress=lambda done, total: c.progress.step(done, total, "samples"),
    )
    notes.append(f"{len(missing)} tensors observed on {len(data)} samples, method {c.options.method}")


def ranges_of(c: Compilation, tensors: tuple[str, ...]) -> Ranges:
    """Turn the statistics into ranges."""
    method: Method = parse_method(c.options.method)
    ranges: Mapping[str, tuple[float, float]] = {
        name: range_from(c.statistics[name], method, levels=levels_of(8), symmetric=False) for name in tensors
    }
    return ranges


def allocate(c: Compilation, selection: Selection, runtime: RuntimeName) -> Plan:
    """Give every site its format and its scales."""
    ranges = ranges_of(c, observed_tensors(selection))
    return make_plan(selection, ranges, c.profile, runtime, c.shapes, method=c.options.method)


def quantized_model(c: Compilation, plan: Plan) -> ir.Model:
    """Round the weights and insert Q/DQ into a copy of the normalized model."""
    assert c.model is not None
    model = c.model.clone()
    QuantizeTables(plan).run(model)
    RoundNearest(plan).run(model)
    InsertQDQ(plan).run(model)
    RemoveUnused().run(model)
    return model


def audit_model(c: Compilation, notes: list[str]) -> None:
    """Run the Q/DQ model: it must load, its error is measured, the user's metric may close the gate."""
    assert c.model is not None and c.quantized is not None and c.plan is not None and c.dataset is not None
    config = config_for(c.profile.runtimes.onnxruntime, threads=c.options.threads)
    c.audit = audit(c.quantized, config)
    samples = list(islice(c.dataset.batches(1), ERROR_SAMPLES))
    c.sqnr_db = layer_errors(
        c.model, c.quantized, tuple(c.plan.activations), samples, threads=c.options.threads
    )
    if c.options.evaluate is not None:
        metric = load_eval(c.options.evaluate)
        c.accuracy = measure(metric, c.model, c.quantized, SessionConfig(threads=c.options.threads))
        check_drop(c.accuracy, c.options.max_drop)
