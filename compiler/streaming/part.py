"""The phases of quantization on one part of a model, as on a small model of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir

from bitwright.compiler import frontend, migration, quantizing
from bitwright.compiler.compilation import Compilation, Progress
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.ingest.dataset import Dataset
from bitwright.compiler.ingest.model_reader import SourceModel
from bitwright.compiler.options import Options
from bitwright.compiler.ort.layer_error import with_outputs
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.plan.planner import RuntimeName, observed_tensors
from bitwright.passes.fix_dims import dynamic_dims

RUNTIME: RuntimeName = "onnxruntime"


def part_compilation(whole: Compilation, model: ir.Model, data: Dataset, progress: Progress) -> Compilation:
    """Return the state that a part begins with: the whole's options and recipe, as far as they mean this part."""
    source = whole.source
    assert source is not None, "ingest is done"
    known = set(dynamic_dims(model))
    names = {node_label(n) for n in model.graph}
    options = replace(
        whole.options,
        dims={k: v for k, v in whole.options.dims.items() if k in known},
        keep_float=whole.options.keep_float & names,
        samples=None,
        method=Options.method,  # no tensor has a calibrated range
        gate=False,
    )
    c = Compilation(options, whole.profile, progress)
    nodes = {n: f for n, f in whole.recipe.recipe.nodes.items() if n in names}
    recipe = whole.recipe.recipe.model_copy(update={"nodes": nodes})
    c.recipe = replace(whole.recipe, recipe=recipe, ranges={})
    c.source = SourceModel(model, source.path, source.sha256, source.bytes)
    c.dataset = data
    return c


def plan_part(c: Compilation) -> None:
    """Run the phases from normalization to the plan; ``c.plan`` has every scale."""
    with c.recorded("normalize") as notes:
        frontend.normalize_model(c, notes)
    with c.recorded("shapes") as notes:
        frontend.choose_shapes(c, notes)
    with c.recorded("plan") as notes:
        c.selection = frontend.select_units(c, RUNTIME)
        if _lacks_shapes(c):
            c.shapes |= _observed_shapes(c)
            c.selection = frontend.reselect(c, RUNTIME)
    with c.recorded("migrate") as notes:
        migration.migrate(c, RUNTIME, notes)
    with c.recorded("calibrate") as notes:
        frontend.calibrate(c, observed_tensors(c.selection), notes)
        migration.observe_inputs(c, c.selection)
    with c.recorded("scales"):
        c.plan = quantizing.with_searched_scales(c, frontend.allocate(c, c.selection, RUNTIME))


def round_part(c: Compilation) -> None:
    """Round a planned part; ``c.quantized`` is the result."""
    assert c.plan is not None, "the part is planned"
    with c.recorded("quantize") as notes:
        c.quantized = quantizing.quantized_model(c, c.plan, notes)


def _weighted(c: Compilation) -> Iterable[ir.Node]:
    assert c.model is not None
    return (n for n in c.model.graph if weight_of(n) is not None)


def _lacks_shapes(c: Compilation) -> bool:
    ends = (v for n in _weighted(c) for v in (n.inputs[0], n.outputs[0]) if v is not None)
    return any((v.name or "") not in c.shapes for v in ends)


def _observed_shapes(c: Compilation) -> dict[str, tuple[int, ...]]:
    """Run one sample: where sizes are computed in the first part, shape inference cannot see them here."""
    assert c.model is not None and c.dataset is not None
    sample = next(iter(c.dataset.batches(1)))
    inputs = {v.name for v in c.model.graph.inputs}
    ends = (v.name or "" for n in _weighted(c) for v in (n.inputs[0], n.outputs[0]) if v is not None)
    wanted = [name for name in dict.fromkeys(ends) if name not in inputs]
    config = SessionConfig(threads=c.options.threads, arena=False)
    found = run(open_session(with_outputs(c.model, wanted), config), sample)
    return {name: array.shape for name, array in {**sample, **found}.items()}
