"""What a call costs on a target: measured where the profile holds measurements, else a roofline.

The roofline is a pure function of node, shapes and profile. Seconds of a call = launch overhead + max(arithmetic,
memory) + conversions at the borders, where

- arithmetic = MACs, with the reduction rounded up to what the instruction takes, over
  MACs/cycle x share reached x clock x cores, for the best compute row;
- memory = bytes of weights, inputs and output over the bandwidth of the nearest level that holds them all;
- conversions = elements x cycles per element over clock x cores: requantizing an integer operator's output,
  quantizing inputs that arrive in float, which is a call of its own.

It ranks choices on one target. It knows no cache conflicts, no partial tiles but those of the reduction,
and no overlap between nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import ceil, prod
from typing import Literal

import onnx_ir as ir

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.compiler.graph.cost import Shapes, is_depthwise, node_macs, reduction, shape_of
from bitwright.compiler.graph.model import constant_array, is_op, node_label
from bitwright.compiler.plan.measured import Estimate, fitted, look_up
from bitwright.compiler.plan.measured import nearest as nearest_call
from bitwright.compiler.plan.signature import QUANTIZE, beside, boundary_signature, fit_names, signature
from bitwright.compiler.plan.units import fused_tail
from bitwright.targets.checks import element_type, holds
from bitwright.targets.schema import (
    Combo,
    ComputeRow,
    MeasuredTimes,
    MemoryLevel,
    Profile,
    QSpace,
    Runtime,
)

RuntimeName = Literal["artifact", "onnxruntime"]
Kind = Literal["gemm", "conv", "depthwise", "elementwise"]

_FLOAT_BYTES = 4
_HALF_BYTES = 2
_BOUNDARY_BYTES = _FLOAT_BYTES + 1


def estimate(
    node: ir.Node,
    shapes: Shapes,
    profile: Profile,
    runtime: RuntimeName,
    fmt: str,
    *,
    float_inputs: Collection[str] = (),
    float_output: bool = False,
) -> float:
    """Return the estimated seconds of one call of a node; the arguments are those of :func:`estimate_call`."""
    found = estimate_call(
        node, shapes, profile, runtime, fmt, float_inputs=float_inputs, float_output=float_output
    )
    return found.seconds


def estimate_call(
    node: ir.Node,
    shapes: Shapes,
    profile: Profile,
    runtime: RuntimeName,
    fmt: str,
    *,
    float_inputs: Collection[str] = (),
    float_output: bool = False,
    neighbour: str = "",
) -> Estimate:
    """Return the estimated seconds of one call of a node and of what is fused behind it, and their source.

    A time measured for exactly this call comes first, then the model fitted to measurements of other shapes, then
    the roofline.

    Args:
        node: Any node whose inputs and outputs have known shapes.
        shapes: Static shapes of tensors whose dimensions are symbolic in the model.
        profile: The target.
        runtime: Which table of integer kernels applies.
        fmt: The format it would run in: ``"float"``, or one that the profile has a kernel for.
        float_inputs: For integers: inputs that arrive in float and are quantized first.
        float_output: For integers: the result is written as float32 (the accumulator is still scaled once).
        neighbour: Format of the layer before it, if it is known.

    Raises:
        ProfileError: The operator has no kernel for the format, or no compute row fits.
        ModelError: A shape is unknown.
    """
    combo = _combo(node, _kernels(profile, runtime), runtime, fmt)
    if combo is not None and _only_stored_narrow(combo, profile):
        # The weight is widened once, when the model is loaded: the kernel is the float one, so its time is, too.
        combo, fmt = None, "float"
    found = _from_measurements(
        node, shapes, profile, runtime, fmt, combo, float_output=float_output, neighbour=neighbour
    )
    if found is None:
        work_s = _roofline_s(node, shapes, profile, fmt, combo, float_output=float_output)
        found = Estimate(_start_s(profile, runtime) + work_s, "modelled")
    for value in node.inputs:
        if combo is not None and value is not None and value.name in float_inputs:
            found += boundary(shape_of(value, shapes, node), profile, runtime, fmt, QUANTIZE)
    return found


def _only_stored_narrow(combo: Combo, profile: Profile) -> bool:
    """Tell whether a kernel's weight is a half-precision copy of what float32 arithmetic reads."""
    act, weight = profile.qspace(combo.act), profile.qspace(combo.weight or combo.act)
    return act.float_type == "f32" and weight.float_type in ("f16", "bf16")


def boundary(
    shape: Sequence[int], profile: Profile, runtime: RuntimeName, fmt: str, operator: str
) -> Estimate:
    """Return the estimated seconds of converting one tensor between float and the integers of a format.

    Args:
        shape: Of the tensor.
        profile: The target.
        runtime: Which of the two runtimes.
        fmt: Format of the operators that read or wrote the integers.
        operator: :data:`~bitwright.compiler.plan.signature.QUANTIZE` or ``DEQUANTIZE``.
    """
    elements = prod(shape)
    times = _times(profile, runtime)
    if times is not None:
        known = look_up(times, operator, fmt, boundary_signature(shape))
        if known is not None:
            return Estimate(known, "measured")
        near = fitted(times, (operator,), fmt, 0, elements * _BOUNDARY_BYTES)
        if near is not None:
            return Estimate(near, "fitted")
    return Estimate(_start_s(profile, runtime) + quantize_s(elements, profile), "modelled")


def _start_s(profile: Profile, runtime: RuntimeName) -> float:
    own = profile.overheads.onnxruntime_per_op_s if runtime == "onnxruntime" else None
    return profile.overheads.per_op_s if own is None else own


def _times(profile: Profile, runtime: RuntimeName) -> MeasuredTimes | None:
    if profile.measured is None:
        return None
    return profile.measured.artifact if runtime == "artifact" else profile.measured.onnxruntime


def _kernels(profile: Profile, name: RuntimeName) -> Runtime:
    return profile.runtimes.artifact if name == "artifact" else profile.runtimes.onnxruntime


def call_overhead(profile: Profile, runtime: RuntimeName) -> float:
    """Return the measured seconds of an empty call of the runtime; 0 where nothing was measured."""
    times = _times(profile, runtime)
    return 0.0 if times is None else times.call_s


def _from_measurements(
    node: ir.Node,
    shapes: Shapes,
    profile: Profile,
    runtime: RuntimeName,
    fmt: str,
    combo: Combo | None,
    *,
    float_output: bool,
    neighbour: str,
) -> Estimate | None:
    times = _times(profile, runtime)
    if times is None:
        return None
    tail = fused_tail(node, _kernels(profile, runtime).fusions)
    writes = "" if combo is None else "f" if float_output else "q"
    key = signature(node, shapes, tail, writes=writes)
    known = look_up(times, node.op_type, fmt, key, neighbour)
    if known is not None:
        return Estimate(known, "measured")
    close = nearest_call(times, node.op_type, fmt, beside(key, neighbour))
    if close is None and neighbour:
        close = nearest_call(times, node.op_type, fmt, key)
    if close is not None:
        return Estimate(close, "fitted")
    moved = traffic(node, shapes, bytes_each(fmt, combo, profile), float_output=float_output)
    near = fitted(times, fit_names(node, shapes), fmt, node_macs(node, shapes), moved)
    return None if near is None else Estimate(near, "fitted")


def bytes_each(fmt: str, combo: Combo | None, profile: Profile) -> tuple[float, float]:
    """Return the bytes of an activation and of a weight; a half-precision format without a kernel takes two."""
    if combo is None and fmt != "float":
        return _HALF_BYTES, _HALF_BYTES
    return widths(combo, profile)


def _roofline_s(
    node: ir.Node, shapes: Shapes, profile: Profile, fmt: str, combo: Combo | None, *, float_output: bool
) -> float:
    compute = 0.0
    if macs := node_macs(node, shapes):
        compute = _compute_s(node, macs, _rows(combo, profile), shapes, profile)
    moved = traffic(node, shapes, bytes_each(fmt, combo, profile), float_output=float_output)
    seconds = max(compute, _memory_s(moved, bool(macs), profile))
    if combo is None:
        return seconds
    cycles = profile.overheads.requantize_cycles_per_element * _elements(node.outputs, shapes, node)
    return seconds + cycles_s(cycles, profile)


def quantize_s(elements: int, profile: Profile) -> float:
    """Return the seconds of converting ``elements`` between float and integer, arithmetic only."""
    return cycles_s(profile.overheads.quantize_cycles_per_element * elements, profile)


def cycles_s(cycles: float, profile: Profile) -> float:
    """Return the seconds of ``cycles`` of work that is spread over all cores."""
    return cycles / (profile.clock_hz * profile.cores)


def work_kind(node: ir.Node, shapes: Shapes) -> Kind:
    """Return which efficiency applies to a node."""
    if is_op(node, "Conv"):
        return "depthwise" if is_depthwise(node, shapes) else "conv"
    return "gemm" if is_op(node, "Gemm", "MatMul") else "elementwise"


def widths(combo: Combo | None, profile: Profile) -> tuple[float, float]:
    """Return the bytes of one activation and of one weight in a kernel's format; float32 without a kernel."""
    if combo is None:
        return _FLOAT_BYTES, _FLOAT_BYTES
    act, weight = profile.qspace(combo.act), profile.qspace(combo.weight or combo.act)
    return _width(act), _width(weight)


def _width(space: QSpace) -> float:
    if space.float_type is not None:
        return _FLOAT_BYTES if space.float_type == "f32" else 2
    scales = _FLOAT_BYTES / space.groups[0] if space.groups else 0.0
    return (space.stored_bits or max(space.bits, 2)) / 8 + scales


def traffic(
    node: ir.Node,
    shapes: Shapes,
    bytes_each: tuple[float, float] = (_FLOAT_BYTES, _FLOAT_BYTES),
    *,
    float_output: bool = False,
) -> float:
    """Return the bytes that one call reads and writes at least once.

    Args:
        node: Any node whose inputs and outputs have known shapes.
        shapes: Static shapes of tensors whose dimensions are symbolic in the model.
        bytes_each: Bytes of one activation and of one element of a constant weight, from :func:`widths`;
            biases and anything else constant take four.
        float_output: The result is written as float32.
    """
    activation, weight = bytes_each
    total = 0.0
    for index, value in enumerate(node.inputs):
        if value is None or not value.name:
            continue
        each = activation
        if constant_array(value) is not None:
            is_weight = index == 1 and is_op(node, "Conv", "Gemm", "MatMul")
            each = weight if is_weight else _FLOAT_BYTES
        total += prod(shape_of(value, shapes, node)) * each
    return total + _elements(node.outputs, shapes, node) * (_FLOAT_BYTES if float_output else activation)


def _elements(values: Collection[ir.Value], shapes: Shapes, node: ir.Node) -> int:
    return sum(prod(shape_of(v, shapes, node)) for v in values if v.name)


def _combo(node: ir.Node, runtime: Runtime, name: str, fmt: str) -> Combo | None:
    """Return the kernel of a format; None for float and for half precision that needs no kernel of its own."""
    if fmt == "float":
        return None
    rule = runtime.ops.get(node.op_type)
    found = None if rule is None else rule.combo_for((fmt,))
    if found is not None or fmt in runtime.float_formats:
        return found
    if rule is None:
        what = f"{name} has no integer kernel for {node.op_type}"
        raise ProfileError(
            what, where=f"node '{node_label(node)}'", fix=nearest(node.op_type, tuple(runtime.ops))
        )
    what = f"{name} has no {fmt} kernel for {node.op_type}"
    known: list[str] = [c.format for c in rule.combos]
    raise ProfileError(what, where=f"node '{node_label(node)}'", fix=nearest(fmt, known))


def _rows(combo: Combo | None, profile: Profile) -> list[ComputeRow]:
    """Return the rows a combo names; if it names none, any row that fits; float ones for float activations."""
    if combo is None:
        return _float_rows(profile)
    if combo.intrinsics:
        return [profile.compute_row(name) for name in combo.intrinsics]
    act, weight = profile.qspace(combo.act), profile.qspace(combo.weight or combo.act)
    if act.float_type is not None or act.codebook is not None or combo.accumulator == "f32":
        return _float_rows(profile)
    return [row for row in profile.compute if _fits(row, act, weight)]


def _fits(row: ComputeRow, act: QSpace, weight: QSpace) -> bool:
    return holds(row.act, element_type(act)) and holds(row.weight, element_type(weight))


def _float_rows(profile: Profile) -> list[ComputeRow]:
    return [row for row in profile.compute if row.act == "f32" and row.weight == "f32"]


def _compute_s(node: ir.Node, macs: int, rows: list[ComputeRow], shapes: Shapes, profile: Profile) -> float:
    if not rows:
        what = f"no compute row of '{profile.name}' can run this node"
        raise ProfileError(
            what, where=f"node '{node_label(node)}'", fix="add a row for its types to 'compute'"
        )
    kind, length = work_kind(node, shapes), reduction(node, shapes)
    return min(_row_s(row, kind, macs, length, profile) for row in rows)


def fastest_row(
    node: ir.Node, shapes: Shapes, profile: Profile, runtime: RuntimeName, fmt: str
) -> ComputeRow | None:
    """Return the compute row that the roofline has a node run on, or None if it multiplies nothing or no row fits.

    Raises:
        ProfileError: The operator has no kernel for the format.
        ModelError: A shape is unknown.
    """
    macs = node_macs(node, shapes)
    if not macs:
        return None
    rows = _rows(_combo(node, _kernels(profile, runtime), runtime, fmt), profile)
    kind, length = work_kind(node, shapes), reduction(node, shapes)
    return min(rows, key=lambda row: _row_s(row, kind, macs, length, profile), default=None)


def call_traffic(
    node: ir.Node,
    shapes: Shapes,
    profile: Profile,
    runtime: RuntimeName,
    fmt: str,
    *,
    float_output: bool = False,
) -> float:
    """Return the bytes that one call in a format reads and writes at least once.

    Raises:
        ProfileError: The operator has no kernel for the format.
        ModelError: A shape is unknown.
    """
    combo = _combo(node, _kernels(profile, runtime), runtime, fmt)
    return traffic(node, shapes, bytes_each(fmt, combo, profile), float_output=float_output)


def _row_s(row: ComputeRow, kind: Kind, macs: int, length: int, profile: Profile) -> float:
    share = float(getattr(profile.efficiency, kind)) * row.efficiency
    # Depthwise kernels multiply channel by channel with ordinary vector code; no reduction is padded.
    padded = macs if kind == "depthwise" else macs // length * (ceil(length / row.k_align) * row.k_align)
    return padded / (row.macs_per_cycle * share * profile.clock_hz * profile.cores)


def holding_level(size_bytes: float, profile: Profile) -> MemoryLevel:
    """Return the nearest memory level that holds ``size_bytes`` spread over all cores, else the last one."""
    fitting = (level for level in profile.memory if level.size_bytes * _parts(level, profile) >= size_bytes)
    return next(fitting, profile.memory[-1])


def _parts(level: MemoryLevel, profile: Profile) -> int:
    return profile.cores if level.per_core else 1


def _memory_s(moved: float, has_macs: bool, profile: Profile) -> float:
    level = holding_level(moved, profile)
    share = 1.0 if has_macs else profile.efficiency.elementwise
    return moved / (level.bytes_per_s * _parts(level, profile) * share)
