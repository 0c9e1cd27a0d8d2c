"""How each constant weight is quantized: its element type, the axis of its scales, and max-abs scales to start from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.graph.operands import stored_weight, table_of, weight_array, weight_of
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.plan.quantizers import grouped_scale, stored_dtype, weight_scale, widen_for_bias
from bitwright.compiler.plan.scale_storage import scale_bits
from bitwright.compiler.plan.support import possible_groups
from bitwright.compiler.plan.units import Unit
from bitwright.targets.schema import Profile, QSpace

# Weights of groups in so many bits are stored in planes of 2 bits and 1 (passes/compact_weights.py).
PLANES = 3


def channel_axis(unit: Unit) -> int:
    """Return the axis of a weight's output channels."""
    return 0 if unit.head.op_type == "Conv" else 1


def group_axis(unit: Unit) -> int:
    """Return the axis that groups of weights are cut along: the reduction's, of a table the row's."""
    return 1 if unit.role == "table" else 1 - channel_axis(unit)


def group_length(space: QSpace, length: int, wanted: int | None = None) -> int:
    """Return how many weights share a scale.

    Args:
        space: A qspace with granularity ``group``.
        length: Weights along the axis that is cut.
        wanted: Taken if the kernel offers it.
    """
    allowed = possible_groups(space, length)
    return wanted if wanted in allowed else allowed[0]


def plan_weight(
    unit: Unit, plan: Plan, profile: Profile, group: int | None = None, *, zero_points: bool = True
) -> str:
    """Register a unit's weight in ``plan.weights`` and return its key, "" if the unit has none.

    The key is the initializer, the view of it, and its input's scale if biased: two readers that need different
    scales get two entries.

    Args:
        unit: An anchor or a table.
        plan: Has the activations already.
        profile: The target.
        group: Wanted group length for grouped scales; None takes the first that the kernel offers.
        zero_points: Groups may have them, where the kernel takes any.
    """
    weight = weight_of(unit.head) or table_of(unit.head)
    if weight is None or unit.combo is None or unit.combo.weight is None:
        return ""
    space = profile.qspace(unit.combo.weight)
    if not zero_points and space.granularity == "group" and space.codebook is None:
        space = space.model_copy(update={"signed": True, "symmetric": True})
    quant = _quant(unit, weight_array(weight), space, group)
    bias = _bias(unit)
    if bias is not None and unit.activations and quant.axis is not None and not quant.group:
        input_scale = plan.activations[unit.activations[0].name or ""].scale
        quant = replace(quant, scale=widen_for_bias(quant.scale, bias, input_scale))
    key = _key(unit)
    known = plan.weights.get(key)
    if known is not None and not _same(known, quant):
        key = f"{key} for {unit.name}"
    plan.weights[key] = replace(quant, tensor=key)
    return key


def _quant(unit: Unit, array: np.ndarray, space: QSpace, group: int | None) -> WeightQuant:
    dtype = stored_dtype(space)
    axis = channel_axis(unit) if space.granularity != "tensor" else None
    if space.float_type is not None:
        return WeightQuant("", dtype, None, np.ones(1, np.float32), bits=16)
    common = {"bits": space.bits, "codebook": space.codebook or ""}
    if space.granularity != "group":
        return WeightQuant("", dtype, axis, weight_scale(array, axis, space), **common)  # type: ignore[arg-type]
    along = group_axis(unit)
    length = group_length(space, array.shape[along], group)
    scale, zero_point = grouped_scale(array, along, length, space)
    # A weight that is stored transposed, or a table, keeps the length it was planned with.
    menu = possible_groups(space, array.shape[along]) if along == 0 and group is None else ()
    return WeightQuant("", dtype, along, scale, zero_point, length, menu=menu, **common)  # type: ignore[arg-type]


def _bias(unit: Unit) -> np.ndarray | None:
    head = unit.head
    return constant_array(head.inputs[2]) if len(head.inputs) > 2 and unit.role == "anchor" else None


def _key(unit: Unit) -> str:
    weight = weight_of(unit.head) or table_of(unit.head)
    stored = stored_weight(weight)
    name = (stored.name if stored is not None else None) or ""
    if unit.role == "table":
        return f"{name} (table)"
    return name if weight is stored else f"{name} (transposed)"


def _same(first: WeightQuant, second: WeightQuant) -> bool:
    return (
        (first.dtype, first.axis, first.group, first.bits, first.codebook)
        == (second.dtype, second.axis, second.group, second.bits, second.codebook)
        and first.scale.shape == second.scale.shape
        and bool((first.scale == second.scale).all())
    )


def stored_bytes(quant: WeightQuant, elements: int) -> int:
    """Return the bytes of a quantized weight in the file: its elements, scales and zero points.

    Args:
        quant: How it is stored.
        elements: How many.
    """
    bits = int("".join(ch for ch in quant.dtype.partition("_")[0].removeprefix("bfloat") if ch.isdigit()))
    points = 0 if quant.zero_point is None else quant.zero_point.size * bits
    taken = quant.bits if quant.group and quant.bits == PLANES else bits
    groups = quant.scale.shape[quant.axis] if quant.group and quant.axis is not None else 1
    scales = scale_bits(quant.scale_storage, groups) * quant.scale.size
    return int(elements * taken + points + scales + 7) // 8
