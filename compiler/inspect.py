"""``inspect``: what a target would do with a model, before any data is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bitwright.compiler import frontend
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import ModelError, UsageError
from bitwright.compiler.graph.cost import Shapes, node_macs
from bitwright.compiler.graph.operands import stored_weight, weight_array, weight_of
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.options import Options
from bitwright.compiler.plan.cost import estimate, estimate_call
from bitwright.compiler.plan.latency import predict, predict_float
from bitwright.compiler.plan.memory import peak_activation_bytes
from bitwright.compiler.plan.planner import RuntimeName, macs_of, plan_selection, runtime_of
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.units import Unit
from bitwright.compiler.shape_choice import static_shapes
from bitwright.passes.fix_dims import dynamic_dims
from bitwright.passes.normalize import normalize
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Profile

SCALE_BYTES = 4


@dataclass(frozen=True)
class OperatorRow:
    """One operator and what is fused behind it.

    Attributes:
        node: Its name.
        op: Operator type.
        format: ``"float"`` or the name of a format.
        role: The profile's role of the operator, "" without an integer kernel.
        reason: Why this format.
        macs: Multiply-accumulates of one call.
        estimated_s: Estimated seconds in this format; None where a shape is unknown.
        estimated_float_s: Estimated seconds in float.
        estimate: Where ``estimated_s`` comes from: ``"measured"``, ``"fitted"`` or ``"modelled"``; "" without.
    """

    node: str
    op: str
    format: str
    role: str
    reason: str
    macs: int
    estimated_s: float | None
    estimated_float_s: float | None
    estimate: str = ""


@dataclass(frozen=True)
class Inspection:
    """What a target would do with a model.

    Attributes:
        model: File name.
        target: Profile name.
        runtime: ``"artifact"`` or ``"onnxruntime"``.
        dims: Sizes of the dynamic dimensions that the figures are for.
        assumed: Those of ``dims`` that nobody named.
        rows: Every operator, in graph order.
        macs: Multiply-accumulates with a constant weight.
        integer_macs: Those of them that run on integers.
        float_bytes: Constants of the float model.
        bytes: The same with integer weights, scales included.
        estimated_s: Estimated seconds of one call, conversions included.
        estimated_float_s: Estimated seconds of the float model.
        estimate: Where ``estimated_s`` comes from: ``"modelled"``, ``"measured"``, or shares in words.
        peak_ram_bytes: Most bytes of activations alive at once; a lower bound.
        warnings: About the model.
    """

    model: str
    target: str
    runtime: str
    dims: dict[str, int]
    assumed: tuple[str, ...]
    rows: tuple[OperatorRow, ...]
    macs: int
    integer_macs: int
    float_bytes: int
    bytes: int
    estimated_s: float
    estimated_float_s: float
    estimate: str = "modelled"
    peak_ram_bytes: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def integer_share(self) -> float:
        """Share of the multiply-accumulates with a constant weight that run on integers."""
        return self.integer_macs / self.macs if self.macs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "integer_share": self.integer_share}


def inspect_model(
    model: str | Path,
    target: str | Path,
    *,
    dims: Mapping[str, int] | None = None,
    runtime: RuntimeName = "artifact",
    keep_float: frozenset[str] = frozenset(),
) -> Inspection:
    """Plan a model for a target without data.

    Args:
        model: The ONNX file.
        target: Profile name or file.
        dims: Sizes of dynamic dimensions. The first dimension of an input is taken as the batch and is 1 unless
            named; every other one must be named.
        runtime: Plan for the compiled artifact or for ONNX Runtime.
        keep_float: Nodes that stay in float.

    Raises:
        BitwrightError: The model or the profile is refused, or a size is missing.
    """
    profile = load_profile(target)
    source = read_model(Path(model))
    normal = source.model.clone()
    normalize(normal, runtime_of(profile, "artifact").opset)
    sizes, assumed = _sizes(normal, dims or {}, str(model))
    shapes = static_shapes(normal, sizes)
    selection = plan_selection(normal, profile, runtime, shapes, keep_float=keep_float)
    found = _inspection(normal, selection, profile, runtime, shapes)
    return Inspection(
        model=source.path.name,
        dims=sizes,
        assumed=assumed,
        warnings=source.warnings,
        runtime=runtime,
        **found,
    )


def dry_run(options: Options, runtime: RuntimeName = "artifact") -> Inspection:
    """Check everything a compilation needs, data included, and plan; writes nothing.

    Raises:
        BitwrightError: Whatever would stop the compilation up to its plan.
    """
    c = Compilation(options, load_profile(options.target))
    notes: list[str] = []
    frontend.ingest(c, notes)
    frontend.normalize_model(c, notes)
    frontend.choose_shapes(c, notes)
    selection = frontend.select_units(c, runtime)
    assert c.model is not None and c.source is not None and c.dataset is not None
    found = _inspection(c.model, selection, c.profile, runtime, c.shapes)
    warnings = (*c.source.warnings, *c.dataset.warnings)
    name = c.source.path.name
    return Inspection(model=name, dims=dict(c.dims), assumed=(), warnings=warnings, runtime=runtime, **found)


def _sizes(model: ir.Model, wanted: Mapping[str, int], where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return a size for every dynamic dimension and the names of those that were assumed."""
    known = dynamic_dims(model)
    batch = {_dim_name(v, 0) for v in model.graph.inputs if v.shape is not None and len(v.shape)}
    missing = [name for name in known if name not in wanted and name not in batch]
    if missing:
        what = f"the size of the dynamic dimension '{missing[0]}' is not known"
        raise UsageError(what, where=where, fix=" ".join(f"--dim {name}=SIZE" for name in missing))
    assumed = tuple(name for name in known if name not in wanted)
    # A name that is no dimension stays in: fixing the shapes refuses it with the nearest one.
    return {**dict.fromkeys(assumed, 1), **wanted}, assumed


def _dim_name(value: ir.Value, axis: int) -> str | None:
    assert value.shape is not None
    dim = value.shape[axis]
    if not isinstance(dim, ir.SymbolicDim):
        return None
    return dim.value if dim.value is not None else f"{value.name}:{axis}"


def _inspection(
    model: ir.Model, selection: Selection, profile: Profile, runtime: RuntimeName, shapes: Shapes
) -> dict[str, Any]:
    rows = tuple(_row(unit, selection, profile, runtime, shapes) for unit in selection.units)
    weighted = [u for u in selection.units if u.role == "anchor" and weight_of(u.head) is not None]
    initializers = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    before = sum(int(t.nbytes) for t in initializers)
    prediction = predict(selection, profile, runtime, shapes)
    return {
        "target": profile.name,
        "rows": rows,
        "macs": sum(macs_of(u, shapes) for u in weighted),
        "integer_macs": sum(macs_of(u, shapes) for u in weighted if u in selection.integer),
        "float_bytes": before,
        "bytes": before - _saved_bytes(selection, profile),
        "estimated_s": prediction.seconds,
        "estimated_float_s": predict_float(selection, profile, runtime, shapes).seconds,
        "estimate": prediction.origin,
        "peak_ram_bytes": peak_activation_bytes(selection, profile, runtime, shapes).bytes,
    }


def _row(
    unit: Unit, selection: Selection, profile: Profile, runtime: RuntimeName, shapes: Shapes
) -> OperatorRow:
    fmt = _format(unit, unit in selection.integer)
    reason = selection.reasons.get(unit.name, "")
    writes_float = unit in selection.integer and unit.output not in selection.quantized
    try:
        macs = node_macs(unit.head, shapes)
        real = estimate(unit.head, shapes, profile, runtime, "float")
        found = estimate_call(unit.head, shapes, profile, runtime, fmt, float_output=writes_float)
    except ModelError:
        return OperatorRow(unit.name, unit.head.op_type, fmt, unit.role, reason, 0, None, None)
    return OperatorRow(
        unit.name, unit.head.op_type, fmt, unit.role, reason, macs, found.seconds, real, found.source
    )


def _format(unit: Unit, integer: bool) -> str:
    return unit.combo.format if integer and unit.combo is not None else unit.float_format


def _saved_bytes(selection: Selection, profile: Profile) -> int:
    """Return what integer weights save; a weight that two operators share is counted once."""
    saved: dict[str, int] = {}
    for unit in selection.integer:
        weight = weight_of(unit.head)
        if weight is None or unit.combo is None or unit.combo.weight is None:
            continue
        stored, array, space = stored_weight(weight), weight_array(weight), profile.qspace(unit.combo.weight)
        channels = (
            array.shape[0 if unit.head.op_type == "Conv" else -1] if space.granularity == "channel" else 1
        )
        name = unit.name if stored is None or not stored.name else stored.name
        saved[name] = int(array.nbytes) - array.size * space.bits // 8 - channels * SCALE_BYTES
    return sum(saved.values())
