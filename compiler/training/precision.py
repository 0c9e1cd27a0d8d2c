"""Fewer bits than the target's kernels have: which layers get them, and the grids to start training from.

A kernel that multiplies 8-bit integers multiplies smaller ones just as well, so a trained model of 2-bit weights and
4-bit activations runs wherever the int8 model does: integers stay in their 8-bit types and use fewer values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import UsageError
from bitwright.compiler.graph.model import node_label
from bitwright.compiler.graph.operands import weight_array, weight_of
from bitwright.compiler.plan.model import ActivationQuant, NodeDecision, Plan, WeightQuant
from bitwright.compiler.plan.quantizers import weight_scale
from bitwright.compiler.training.request import MOST, Precision
from bitwright.targets.schema import QSpace

LARGEST_OF_8 = 127
SATURATING = ("Conv", "Gemm", "MatMul", "Add", "Mul")
Ranges = Mapping[str, tuple[float, float]]


def narrowed_layers(plan: Plan, *, everywhere: bool) -> tuple[NodeDecision, ...]:
    """Return the layers of 8-bit weights and activations that get fewer, in graph order.

    The first and the last layer with a weight keep 8 bits unless ``everywhere``: they hold few of the weights, and what
    they lose no other layer can make up for.
    """
    layers = [d for d in plan.nodes.values() if d.weight and d.role == "anchor"]
    inner = layers if everywhere else layers[1:-1]
    return tuple(d for d in inner if d.integer and _is_integer(plan.weights[d.weight]))


def _is_integer(quant: WeightQuant) -> bool:
    return quant.dtype == "int8" and not quant.group


def with_weight_bits(plan: Plan, model: ir.Model, precision: Precision) -> Plan:
    """Return the plan with narrower weights in the inner layers, at max-abs scales (a search follows).

    Raises:
        UsageError: No layer can be narrowed.
    """
    wanted = precision.weights
    if wanted is None:
        return plan
    layers = narrowed_layers(plan, everywhere=precision.everywhere)
    if not layers:
        what = "no layer between the first and the last one multiplies 8-bit integers"
        fix = "train weight-only formats by their recipe, e.g. --recipe w4 or ternary"
        raise UsageError(what, where="--weights", fix=fix)
    arrays = {node_label(n): weight_array(w) for n in model.graph if (w := weight_of(n)) is not None}
    weights = dict(plan.weights)
    for layer in layers:
        weights[layer.weight] = _narrow_weight(weights[layer.weight], arrays[layer.node], wanted)
    return replace(plan, weights=weights)


def _narrow_weight(quant: WeightQuant, array: np.ndarray, wanted: int | str) -> WeightQuant:
    if isinstance(wanted, int):
        largest = 2 ** (wanted - 1) - 1
        scale = weight_scale(array, quant.axis, QSpace(symmetric=True)) * np.float32(LARGEST_OF_8 / largest)
        return replace(quant, scale=scale.astype(np.float32), bits=wanted)
    few = QSpace(bits=2 if wanted == "ternary" else 1, codebook=wanted, symmetric=True)  # type: ignore[arg-type]
    return replace(quant, scale=weight_scale(array, quant.axis, few), bits=few.bits, codebook=wanted)


def narrow_tensors(plan: Plan, precision: Precision, writers: Mapping[str, str]) -> frozenset[str]:
    """Return the activations that get fewer bits: what narrowed layers read, and what shares a scale with it.

    What only additions and pooling read keeps 8 bits: there is no product to be saved. So does what pooling writes: the
    kernels of products and additions saturate at any bounds, those of pooling at their type's.

    Args:
        plan: Whole.
        precision: The width.
        writers: Tensor -> operator that computes it; a tensor that only moves may be missing, as may inputs.
    """
    if precision.activations is None or precision.activations == MOST:
        return frozenset()
    layers = narrowed_layers(plan, everywhere=precision.everywhere)
    outer = {t for d in plan.nodes.values() if d.weight and d not in layers for t in d.inputs}
    read = {t for d in layers for t in d.inputs} - outer
    groups = {t: quant.tie or t for t, quant in plan.activations.items()}
    wanted = {groups[t] for t in read}
    unfit = {groups[t] for t in groups if writers.get(t, SATURATING[0]) not in SATURATING}
    return frozenset(t for t, group in groups.items() if group in wanted - unfit)


def with_activation_bits(plan: Plan, tensors: frozenset[str], bits: int, ranges: Ranges) -> Plan:
    """Return the plan with other ranges, scales and zero points for narrow activations.

    The integers used are the smallest of the type, so that its own saturation cuts one end; where a type has a fixed
    zero point (symmetric quantizers), those around it.

    Args:
        plan: Not changed.
        tensors: From :func:`narrow_tensors`.
        bits: Of these.
        ranges: Tensor -> range for so many levels; of tensors with one scale, what covers all.
    """
    activations = dict(plan.activations)
    groups: dict[str, list[str]] = {}
    for tensor in sorted(tensors):
        groups.setdefault(activations[tensor].tie or tensor, []).append(tensor)
    for members in groups.values():
        low = min(0.0, *(ranges[t][0] for t in members))
        high = max(0.0, *(ranges[t][1] for t in members))
        for tensor in members:
            activations[tensor] = _narrow_activation(activations[tensor], bits, low, high)
    return replace(plan, activations=activations)


def _narrow_activation(quant: ActivationQuant, bits: int, low: float, high: float) -> ActivationQuant:
    smallest, steps = levels_of_type(quant.dtype)[0], 2**bits - 1
    if _is_centred(quant):
        reach = high / steps if quant.low >= 0 else max(-low, high) / _largest(bits)
        return replace(quant, scale=float(np.float32(reach or 1.0)), low=low, high=high)
    scale = (high - low) / steps or 1.0
    zero = int(np.clip(np.rint(-low / scale), 0, steps))
    return replace(quant, scale=float(np.float32(scale)), zero_point=smallest + zero, low=low, high=high)


def _is_centred(quant: ActivationQuant) -> bool:
    """Tell whether 0 is in the middle of the type, as symmetric quantizers have it."""
    return quant.dtype == "int8" and quant.zero_point == 0


def _largest(bits: int) -> int:
    """Return the largest signed integer of a width; of one bit 1, beside 0 and -1."""
    return max(1, int(2 ** (bits - 1)) - 1)


def levels(plan: Plan, tensors: frozenset[str], bits: int | None) -> dict[str, tuple[int, int]]:
    """Return the smallest and the largest integer of every activation of the plan."""
    found = {}
    for tensor, quant in plan.activations.items():
        low, high = levels_of_type(quant.dtype)
        if tensor in tensors and bits is not None:
            if not _is_centred(quant):
                high = low + 2**bits - 1
            elif quant.low < 0:
                low, high = -(2 ** (bits - 1)), _largest(bits)
            else:
                low, high = 0, 2**bits - 1
        found[tensor] = (low, high)
    return found


def levels_of_type(dtype: str) -> tuple[int, int]:
    """Return the smallest and the largest integer of a type, e.g. ``"uint8"``."""
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)
