"""From a plan to a quantized model: weights are rounded, Q/DQ inserted, low-bit kernels spelled out where needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import onnx_ir as ir

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.plan.granularity import choose_granularity
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.scale_storage import narrowed
from bitwright.compiler.plan.weight_search import search_weight_scales
from bitwright.passes.block_tables import BlockTables
from bitwright.passes.compact_weights import CompactWeights, is_compact
from bitwright.passes.contract import Pass
from bitwright.passes.correct_bias import CorrectBias
from bitwright.passes.expand_dequantize import ExpandDequantize
from bitwright.passes.fuse_gelu import FuseGelu
from bitwright.passes.insert_qdq import InsertQDQ, activation_opset
from bitwright.passes.narrow_floats import NarrowFloats
from bitwright.passes.pack_bnb4 import PackBnb4
from bitwright.passes.pack_nbits import PackNBits
from bitwright.passes.quantize_dynamic import QuantizeDynamic
from bitwright.passes.quantize_tables import QuantizeTables
from bitwright.passes.raise_opset import RaiseOpset
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_gptq import RoundGPTQ
from bitwright.passes.round_nearest import RoundNearest
from bitwright.passes.stored_weights import needed_opset
from bitwright.targets.schema import Profile

_GRANULARITY: Mapping[str, Literal["tensor", "row"]] = {"int8-dynamic": "tensor", "int8-row": "row"}
_HALF = {"fp16": "float16", "bf16": "bfloat16"}


def with_searched_scales(c: Compilation, plan: Plan) -> Plan:
    """Return the plan with the weight scales that the recipe wants."""
    assert c.model is not None
    rounding = c.recipe.recipe.rounding
    storage = rounding.stored_scales if plan.runtime == "onnxruntime" else "float32"
    if rounding.granularity == "error":
        plan = choose_granularity(plan, c.model, c.moments)
    if rounding.scales == "mse":
        plan = search_weight_scales(plan, c.model, c.moments)
    return narrowed(plan, storage)


def quantized_model(c: Compilation, plan: Plan, notes: list[str] | None = None) -> ir.Model:
    """Return a quantized copy of the float model, rounded as the recipe says."""
    assert c.model is not None
    return _run((*_rounding(c, plan), *_finishing(c, plan)), c.model, plan, notes)


def rounded_model(c: Compilation, plan: Plan) -> ir.Model:
    """Return a copy of the float model with rounded weights and corrected biases, and no other change."""
    assert c.model is not None
    return _run(_rounding(c, plan), c.model, plan, None)


def draft_model(c: Compilation, plan: Plan) -> ir.Model:
    """Return a quantized copy with weights rounded to nearest: as fast as the real one, made in no time."""
    assert c.model is not None
    return _run(
        (BlockTables(plan), QuantizeTables(plan), RoundNearest(plan), *_finishing(c, plan)),
        c.model,
        plan,
        None,
    )


def compact(c: Compilation, notes: list[str]) -> None:
    """Store the finished model's packed weights in as few bytes as the plan says; nothing fuses behind this."""
    assert c.quantized is not None and c.plan is not None
    if is_compact_plan(c.plan, c.profile):
        compact_weights(c.quantized, notes)


def compact_weights(model: ir.Model, notes: list[str]) -> None:
    """Do so whatever the plan, in place."""
    result = CompactWeights().run(model)
    RemoveUnused().run(model)
    notes.append(f"{result.changed} operators read weights that are unpacked when a session is opened")


def is_compact_plan(plan: Plan, profile: Profile) -> bool:
    """Tell whether a file for ONNX Runtime holds weights of a plan in fewer bytes than kernels read."""
    return profile.runtimes.onnxruntime.contrib_ops and _is_compact(plan)


def _is_compact(plan: Plan) -> bool:
    return any(is_compact(quant) for quant in plan.weights.values())


def _run(rewrites: Iterable[Pass], source: ir.Model, plan: Plan, notes: list[str] | None) -> ir.Model:
    model = source.clone()
    opset = max(needed_opset(plan.weights.values()), activation_opset(plan.activations.values()))
    if opset > (model.graph.opset_imports.get("") or 0):
        model = RaiseOpset(opset).run(model).model
    for rewrite in rewrites:
        result = rewrite.run(model)
        if notes is not None:
            notes.extend(f"{rewrite.name}: {note}" for note in result.notes)
    return model


def _rounding(c: Compilation, plan: Plan) -> Iterator[Pass]:
    """Yield the passes that turn float weights into integers."""
    rounding = c.recipe.recipe.rounding
    yield BlockTables(plan, c.tied)
    yield QuantizeTables(plan)
    if rounding.method == "gptq":
        yield RoundGPTQ(plan, c.moments, refine=rounding.refine)
    yield RoundNearest(plan)
    if rounding.correct_bias and c.model is not None:
        yield CorrectBias(plan, c.moments, c.model)


def _finishing(c: Compilation, plan: Plan) -> Iterator[Pass]:
    """Yield the passes that give the graph the form its runtime executes."""
    dynamic = {n: _GRANULARITY[d.format] for n, d in plan.nodes.items() if d.format in _GRANULARITY}
    if dynamic:
        yield QuantizeDynamic(dynamic)
    table = c.profile.runtimes.onnxruntime
    foreign = plan.runtime == "onnxruntime" and table.contrib_ops
    yield InsertQDQ(plan, float_bias=plan.runtime == "onnxruntime" and table.bias == "f32")
    if foreign:
        yield FuseGelu()
    for fmt, dtype in _HALF.items():
        nodes = frozenset(n for n, d in plan.nodes.items() if d.format == fmt)
        if nodes:
            ranges = {name: (s.low, s.high) for name, s in c.statistics.items()}
            yield NarrowFloats(dtype, nodes, ranges)
    # On processors without VNNI that option makes ONNX Runtime give blocked weights a scalar zero point, which it
    # then refuses: there the products are written out. An artifact's model is executed by ONNX Runtime, too.
    spelled_out = "session.x64quantprecision" in table.session_config
    if foreign or plan.runtime == "artifact":
        yield PackNBits(everywhere=spelled_out or (foreign and _is_compact(plan)))
    if foreign:
        yield PackBnb4()
    if any(d.format == "fp8-weights" for d in plan.nodes.values()):
        yield ExpandDequantize(types=frozenset({"FLOAT8E4M3FN"}))
    yield RemoveUnused()
