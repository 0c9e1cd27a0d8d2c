"""The phases that ``compile`` and ``quantize`` share: from a file nobody vouches for to an audited Q/DQ model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice

import numpy as np
import onnx_ir as ir

from bitwright.compiler.calibrate.methods import Method, parse_method, range_from
from bitwright.compiler.calibrate.stream import collect
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.decoding.context import check_lengths, context_of
from bitwright.compiler.decoding.perplexity import PerplexityMetric
from bitwright.compiler.errors import InternalError, UsageError, nearest
from bitwright.compiler.fixed_cache import open_decoder
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.ingest.dataset import Dataset, dataset_from_memory, open_dataset, random_dataset
from bitwright.compiler.ingest.dataset_views import Held, Limited
from bitwright.compiler.ingest.evaluator import load_eval
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ingest.stated_context import state_context
from bitwright.compiler.ingest.unpadded import open_unpadded
from bitwright.compiler.options import BUDGETS, CIRCUIT_BUDGETS, CIRCUIT_OBJECTIVES
from bitwright.compiler.ort.audit import audit
from bitwright.compiler.ort.equality import relative_difference
from bitwright.compiler.ort.layer_error import layer_errors
from bitwright.compiler.ort.own_error import own_errors
from bitwright.compiler.ort.placement import audit_placement
from bitwright.compiler.ort.session import SessionConfig, config_for, local_config, runs_here
from bitwright.compiler.ort.what_if import what_if_float
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
from bitwright.compiler.plan.units import FormatChoice
from bitwright.compiler.recipe.schema import Recipe
from bitwright.compiler.shape_choice import choose_dims, static_shapes
from bitwright.compiler.unpadded import drop_masks, interface_of, with_masks
from bitwright.passes.insert_qdq import InsertQDQ
from bitwright.passes.normalize import normalize
from bitwright.passes.quantize_tables import QuantizeTables
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_nearest import RoundNearest
from bitwright.targets.schema import FOLDED_FAMILIES, SHORT_FORMATS, Runtime

# Folding BatchNorm and biases reorders float32 sums; a real mistake shows up as errors of order one.
NORMALIZE_BOUND = 1e-3
RANDOM_SAMPLES = 8
ERROR_SAMPLES = 4
ADVISED_LAYERS = 3
# Samples of the calibration data that formats are judged by, held back if there are this many times as many.
JUDGING, PLENTY = 16, 8
# Formats that read integers with scales from calibration.
READING = ("int8", *SHORT_FORMATS, "w8a16", "fp8")


def ingest(c: Compilation, notes: list[str]) -> None:
    """Read and check the model, then open the data against it."""
    c.source = read_model(c.options.model)
    notes.extend(c.source.warnings)
    context = state_context(c.source.model, c.source.path)
    if context is not None:
        notes.append(f"the model takes {context} tokens, as the config.json beside it says")
    if c.options.unpadded:
        drop_masks(c, notes)
    if c.options.context is not None:
        open_decoder(c, runtime_of(c.profile, "artifact").opset, notes)
    else:
        c.dataset = _open_data(c)
        check_lengths(c.dataset, c.source.model, c.dataset.source)
        notes.extend((*c.dataset.notes, *c.dataset.warnings))
    if c.options.validation is not None:
        c.validation = _opened(c, c.options.validation)
        check_lengths(c.validation, c.source.model, c.validation.source)
        notes.extend((*c.validation.notes, *c.validation.warnings))
    if c.options.evaluate is not None:
        metric = load_eval(c.options.evaluate)  # refuse a wrong metric before any work is done
        if isinstance(metric, PerplexityMetric):
            metric.check_context(context_of(c.source.model))


def _open_data(c: Compilation) -> Dataset:
    assert c.source is not None
    data = c.options.data
    if data is None:
        return random_dataset(c.source.model, RANDOM_SAMPLES, seed=0, dims=c.options.dims)
    return _opened(c, data)


def _opened(
    c: Compilation, data: str | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]]
) -> Dataset:
    """Open samples of the model; of one that lost its masks they may still have some, which are checked."""
    assert c.source is not None
    if c.masked is not None:
        return open_unpadded(data, c.source.model, interface_of(c.masked))
    return (
        open_dataset(data, c.source.model)
        if isinstance(data, str)
        else dataset_from_memory(data, c.source.model)
    )


def normalize_model(c: Compilation, notes: list[str]) -> None:
    """Bring the model into normal form and check that it still computes the same."""
    assert c.source is not None and c.dataset is not None
    original = c.source.model
    c.model = c.normalized = original.clone()
    runtime = runtime_of(c.profile, "artifact")
    notes.extend(normalize(c.model, runtime.opset).notes)
    sample = next(iter(c.dataset.batches(1)))
    if c.masked is not None:
        original, sample = c.masked, with_masks(c.masked, sample)
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
    asked = c.options
    samples = c.dataset.batches(1)
    c.dims = choose_dims(
        c.model, samples, asked.dims, buckets=asked.buckets, loop=asked.loop, dynamic=asked.dynamic
    )
    c.shapes = static_shapes(c.model, c.dims)
    if c.dims:
        notes.append("planned for " + ", ".join(f"{k}={v}" for k, v in c.dims.items()))


def select_units(c: Compilation, runtime: RuntimeName) -> Selection:
    """Choose what runs on integers in one of the two runtimes."""
    check_names(c, early=True)
    c.formats = format_choice(c.recipe.recipe, runtime_of(c.profile, runtime))
    return reselect(c, runtime)


def reselect(
    c: Compilation, runtime: RuntimeName, keep: frozenset[str] = frozenset(), *, alone: bool = False
) -> Selection:
    """Choose again what runs on integers: the model or the formats have changed, or more is to stay in float.

    ``alone``: single layers are to be looked at, what stands between float layers stays float on any target.
    """
    assert c.model is not None
    kept = keep | c.options.keep_float
    return plan_selection(
        c.model, c.profile, runtime, c.shapes, keep_float=kept, formats=c.formats, alone=alone
    )


def format_choice(recipe: Recipe, runtime: Runtime) -> FormatChoice:
    """Return the formats a recipe allows."""
    formats = recipe.formats
    if recipe.choose == "allocate":
        # The allocator starts from what can run, what reads integers first: their ranges have to be observed.
        formats = tuple(
            sorted((f for f in formats if f in runtime.formats()), key=lambda f: f not in READING)
        )
    return FormatChoice(formats, recipe.others, recipe.tables, recipe.nodes)


def check_recipe(c: Compilation, runtime: RuntimeName) -> list[str]:
    """Refuse a recipe the target has no kernels for; return notes about formats that are left out.

    Raises:
        UsageError: Neither the recipe's first format runs on the target nor, if formats are chosen, any other; or a
            budget means nothing there.
    """
    _check_budgets(c, circuit=runtime == "artifact" and c.profile.family in FOLDED_FAMILIES)
    recipe, table = c.recipe.recipe, runtime_of(c.profile, runtime)
    available = table.formats()
    wanted = [f for f in dict.fromkeys((*recipe.formats, *recipe.nodes.values())) if f != "float"]
    missing = [f for f in wanted if f not in available]
    first = recipe.formats[0] in missing and recipe.choose != "allocate"
    if wanted and (missing == wanted or first):
        raise _refused(c, runtime, missing[0])
    return [f"format {f} has no kernel on {c.profile.name}: left out" for f in missing]


def _check_budgets(c: Compilation, *, circuit: bool) -> None:
    """Refuse bounds and objectives that only circuits have, or that circuits do not have."""
    own = (*CIRCUIT_BUDGETS, *CIRCUIT_OBJECTIVES)
    asked = [("--budget", name) for name in c.options.budget]
    if c.options.objective is not None:
        asked.append(("--minimise", c.options.objective))
    for option, name in asked:
        if name == "loss" or (name in own) == circuit:
            continue
        what = f"'{name}' bounds circuits, and nothing else" if name in own else f"a circuit has no '{name}'"
        known = own if circuit else [n for n in BUDGETS if n not in own]
        raise UsageError(what, where=option, fix=f"for {c.profile.name}: {', '.join(dict.fromkeys(known))}")


def _refused(c: Compilation, runtime: RuntimeName, missing: str) -> UsageError:
    other: RuntimeName = "onnxruntime" if runtime == "artifact" else "artifact"
    place = {"artifact": "the compiled artifact", "onnxruntime": "ONNX Runtime"}
    verb = {"artifact": "compile", "onnxruntime": "quantize"}
    what = f"{place[runtime]} has no kernel for the format {missing} on {c.profile.name}"
    why = runtime_of(c.profile, runtime).refused.get(missing)  # type: ignore[call-overload]
    if why is not None:
        what = f"{what}: {why}"
    fix = f"formats there: {', '.join(runtime_of(c.profile, runtime).formats())}"
    if missing in runtime_of(c.profile, other).formats():
        fix += f"; {place[other]} has it: bitwright {verb[other]} --recipe {c.recipe.recipe.name}"
    return UsageError(what, where="--recipe", fix=fix)


def check_names(c: Compilation, *, early: bool = False) -> None:
    """Refuse names that the user gave and the model, normalized or migrated, does not have.

    Args:
        c: The compilation.
        early: Only names on the command line: a plan may name what the migration is still to make.
    """
    assert c.normalized is not None and c.model is not None
    nodes = list(dict.fromkeys(node_label(n) for model in (c.normalized, c.model) for n in model.graph))
    recipe = f"--recipe {c.options.recipe}"
    tensors = [v.name or "" for n in c.model.graph for v in n.outputs] + [
        v.name or "" for v in c.model.graph.inputs
    ]
    _check_known("node", c.options.keep_float, nodes, "--keep-float")
    if early:
        return
    _check_known("node", _not_made(c, c.recipe.recipe.nodes, nodes + tensors), nodes, recipe)
    _check_known("tensor", _not_made(c, c.recipe.ranges, nodes + tensors), tensors, recipe)


def check_known_nodes(c: Compilation, model: ir.Model) -> None:
    """Refuse names of nodes that the user gave and a model, as it was read, does not have.

    Raises:
        UsageError: Names the first such node and the nearest one there is.
    """
    nodes = [node_label(n) for n in model.graph]
    _check_known("node", c.options.keep_float, nodes, "--keep-float")
    if not c.recipe.target:  # a plan names what normalization and migration made, too
        _check_known("node", c.recipe.recipe.nodes, nodes, f"--recipe {c.options.recipe}")


def _not_made(c: Compilation, names: Iterable[str], known: list[str]) -> list[str]:
    """Return the names of a recipe without those that a migration made when the plan it comes from was written.

    With another format for one layer it may not make them again. What a rewrite adds is named after what the model has.
    """
    present = frozenset(known)
    return [n for n in names if n in present or not c.recipe.target or not _named_after(n, present)]


def _named_after(name: str, known: frozenset[str]) -> bool:
    return any(name[:k] in known for k, ch in enumerate(name) if ch == "_")


def _check_known(what: str, names: Iterable[str], known: list[str], where: str) -> None:
    present = set(known)
    for name in names:
        if name not in present:
            msg = f"the model has no {what} '{name}'"
            raise UsageError(msg, where=where, fix=nearest(name, known))


def samples_of(c: Compilation) -> Dataset | Held | Limited:
    """Return the calibration samples that the user wants to be used."""
    assert c.dataset is not None
    used = Held(c.dataset, JUDGING, back=False) if _holds_back(c) else c.dataset
    return used if c.options.samples is None else Limited(used, c.options.samples)


def judging_samples(c: Compilation, most: int | None = None) -> Dataset | Held | Limited:
    """Return the samples that formats are judged by.

    They are the user's; without any, some that calibrate nothing are held back if an allocation is to come and there
    are plenty, else the first that calibrate: rounding fits those, and seems better there than it is.

    Args:
        c: Has its data.
        most: Take at most so many of the user's, evenly spaced.
    """
    assert c.dataset is not None
    if c.validation is not None:
        many = most is not None and len(c.validation) > most
        return Held(c.validation, most, back=True) if many and most is not None else c.validation
    if _holds_back(c):
        return Held(c.dataset, JUDGING, back=True)
    return Limited(c.dataset, min(JUDGING, c.options.samples or JUDGING))


def _holds_back(c: Compilation) -> bool:
    assert c.dataset is not None
    plenty = len(c.dataset) >= PLENTY * JUDGING and c.options.samples is None
    return c.allocates and c.validation is None and plenty


def calibrate(c: Compilation, tensors: tuple[str, ...], notes: list[str]) -> None:
    """Learn activation ranges in one streaming pass."""
    assert c.model is not None and c.dataset is not None
    missing = tuple(t for t in tensors if t not in c.statistics)
    if not missing:
        return
    data = samples_of(c)
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
    found: Mapping[str, tuple[float, float]] = {
        name: c.recipe.ranges[name]
        if name in c.recipe.ranges
        else range_from(c.statistics[name], method, levels=levels_of(8), symmetric=False)
        for name in tensors
    }
    return found


def allocate(c: Compilation, selection: Selection, runtime: RuntimeName) -> Plan:
    """Give every site its format and its scales."""
    ranges = ranges_of(c, observed_tensors(selection))
    recipe = c.recipe.recipe
    return make_plan(
        selection,
        ranges,
        c.profile,
        runtime,
        c.shapes,
        method=c.options.method,
        group=c.options.group or recipe.group,
        zero_points=recipe.rounding.zero_points,
    )


def quantized_model(c: Compilation, plan: Plan) -> ir.Model:
    """Round the weights and insert Q/DQ into a copy of the float model."""
    assert c.model is not None
    model = c.model.clone()
    QuantizeTables(plan).run(model)
    RoundNearest(plan).run(model)
    InsertQDQ(plan).run(model)
    RemoveUnused().run(model)
    return model


def audit_model(c: Compilation, notes: list[str]) -> None:
    """Run the Q/DQ model: it must load, its error is measured layer by layer.

    What a provider for other hardware would fuse cannot be seen here: its rules are checked instead.
    """
    assert c.model is not None and c.quantized is not None and c.plan is not None and c.dataset is not None
    runtime = c.profile.runtimes.onnxruntime
    if runs_here(runtime):
        c.audit = audit(c.quantized, config_for(runtime, threads=c.options.threads))
    elif c.plan.runtime == "onnxruntime":
        c.audit = audit_placement(c.quantized, runtime)
    config = local_config(runtime, threads=c.options.threads)
    _measure_errors(c, c.plan, list(islice(c.dataset.batches(1), ERROR_SAMPLES)), config)


def _measure_errors(
    c: Compilation, plan: Plan, samples: list[dict[str, np.ndarray]], config: SessionConfig
) -> None:
    """Measure what every layer adds and inherits, and what the worst layers cost the outputs."""
    assert c.model is not None and c.quantized is not None and c.selection is not None
    written = {u.name: u.output.name or "" for u in c.selection.units}
    layers = {
        node: written[node] for node, d in plan.nodes.items() if d.format != "float" and node in written
    }
    c.sqnr_db = layer_errors(
        c.model, c.quantized, (*plan.activations, *layers.values()), samples, config=config
    )
    read = {tensor for d in plan.nodes.values() for tensor in d.inputs}
    unread = {n: t for n, t in layers.items() if t in plan.activations and t not in read}
    c.own_db = own_errors(
        c.model, c.quantized, list(layers.values()), samples, unread=frozenset(unread.values()), config=config
    )
    weighted = [n for n, tensor in layers.items() if plan.nodes[n].weight and tensor in c.own_db]
    worst = sorted(weighted, key=lambda n: c.own_db[layers[n]])[:ADVISED_LAYERS]
    c.advice = what_if_float(c.model, c.quantized, worst, samples, unread=unread, config=config)
