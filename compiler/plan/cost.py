"""The roofline that decides whether integers pay: a pure function of node, shapes and target profile.

Seconds of a call = launch overhead + max(arithmetic, memory) + conversions at the borders, where

- arithmetic = MACs, with the reduction rounded up to what the instruction takes, over
  MACs/cycle x share reached x clock x cores, for the best compute row;
- memory = bytes of weights, inputs and output over the bandwidth of the nearest level that holds them all;
- conversions = elements x cycles per element over clock x cores: requantizing an integer operator's output,
  quantizing inputs that arrive in float.

It ranks choices on one target. It knows no cache conflicts, no partial tiles but those of the reduction,
and no overlap between nodes.
"""

from __future__ import annotations

from collections.abc import Collection
from math import ceil, prod
from typing import Literal

import onnx_ir as ir

from bitwright.compiler.errors import ProfileError, nearest
from bitwright.compiler.graph.cost import Shapes, is_depthwise, node_macs, reduction, shape_of
from bitwright.compiler.graph.model import constant_array, is_op, node_label
from bitwright.targets.checks import element_type, holds
from bitwright.targets.schema import Combo, ComputeRow, MemoryLevel, Profile, QSpace, Runtime

RuntimeName = Literal["artifact", "onnxruntime"]
Kind = Literal["gemm", "conv", "depthwise", "elementwise"]

_FLOAT_BYTES = 4


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
    """Return the estimated seconds of one call of a node.

    Args:
        node: Any node whose inputs and outputs have known shapes.
        shapes: Static shapes of tensors whose dimensions are symbolic in the model.
        profile: The target.
        runtime: Which table of integer kernels applies.
        fmt: The format it would run in: ``"float"``, or one that the profile has a kernel for.
        float_inputs: For integers: inputs that arrive in float and are quantized first.
        float_output: For integers: the result is written as float32 (the accumulator is still scaled once).

    Raises:
        ProfileError: The operator has no kernel for the format, or no compute row fits.
        ModelError: A shape is unknown.
    """
    combo = _combo(node, getattr(profile.runtimes, runtime), runtime, fmt) if fmt != "float" else None
    compute = 0.0
    if macs := node_macs(node, shapes):
        rows = _rows(combo, profile) if combo is not None else _float_rows(profile)
        compute = _compute_s(node, macs, rows, shapes, profile)
    moved = traffic(node, shapes, widths(combo, profile), float_output=float_output)
    seconds = profile.overheads.per_op_s + max(compute, _memory_s(moved, bool(macs), profile))
    if fmt == "float":
        return seconds
    cycles = profile.overheads.requantize_cycles_per_element * _elements(node.outputs, shapes, node)
    entering = [v for v in node.inputs if v is not None and v.name in float_inputs]
    return seconds + cycles_s(cycles, profile) + quantize_s(_elements(entering, shapes, node), profile)


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


def _combo(node: ir.Node, runtime: Runtime, name: str, fmt: str) -> Combo:
    rule = runtime.ops.get(node.op_type)
    if rule is None:
        what = f"{name} has no integer kernel for {node.op_type}"
        raise ProfileError(
            what, where=f"node '{node_label(node)}'", fix=nearest(node.op_type, tuple(runtime.ops))
        )
    combo = rule.combo_for((fmt,))
    if combo is None:
        what = f"{name} has no {fmt} kernel for {node.op_type}"
        known: list[str] = [c.format for c in rule.combos]
        raise ProfileError(what, where=f"node '{node_label(node)}'", fix=nearest(fmt, known))
    return combo


def _rows(combo: Combo, profile: Profile) -> list[ComputeRow]:
    """Return the rows a combo names; if it names none, any row that fits; float ones for float activations."""
    if combo.intrinsics:
        return [profile.compute_row(name) for name in combo.intrinsics]
    act, weight = profile.qspace(combo.act), profile.qspace(combo.weight or combo.act)
    if act.float_type is not None:
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
