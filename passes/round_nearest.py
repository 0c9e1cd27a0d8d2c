"""Replace the weights that the plan quantizes by integers (round to nearest) and what dequantizes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, node_label
from bitwright.compiler.graph.operands import weight_array, weight_of
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.rounding.grid import codebook
from bitwright.passes.contract import PassResult
from bitwright.passes.stored_weights import (
    FLOAT_TYPES,
    expand,
    integer_range,
    is_indexed,
    store_weight,
    stored_type,
)

BLOCK = 1 << 18  # elements that are rounded at a time: the steps in between are copies of what they work on


def round_to_nearest(weight: np.ndarray, quant: WeightQuant) -> np.ndarray:
    """Return what is stored of a weight: ``clip(rint(w / s) + z)``, rounding half to even.

    Of a codebook the nearest value is taken: its position for NF4, itself for ternary and binary. A weight in half
    precision is returned as it is.

    Args:
        weight: float32, of at least one dimension.
        quant: Its scales, zero points and format.
    """
    if quant.dtype in FLOAT_TYPES:
        return weight
    integers: np.ndarray = np.empty(weight.shape, _array_type(quant))
    rows = max(1, BLOCK // max(1, weight[:1].size))
    if quant.group and quant.axis == 0:
        rows = -(-rows // quant.group) * quant.group
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        integers[start : start + rows] = _round(part, _rows(quant, start, len(part)))
    return integers


def _array_type(quant: WeightQuant) -> np.dtype[np.generic]:
    """Return the numpy type that the integers are rounded to; 4 and 2 bits are packed when they are written."""
    if quant.dtype.startswith("float8"):
        return stored_type(quant.dtype)
    return np.dtype(np.uint8 if quant.dtype.startswith("uint") else np.int8)


def _rows(quant: WeightQuant, start: int, count: int) -> WeightQuant:
    """Return the entry of ``count`` rows of a weight."""
    if quant.axis != 0 and not quant.group:
        return quant
    each = quant.group if quant.group and quant.axis == 0 else 1
    part = slice(start // each, -(-(start + count) // each))
    zero_point = None if quant.zero_point is None else quant.zero_point[part]
    return replace(quant, scale=quant.scale[part], zero_point=zero_point)


def _round(weight: np.ndarray, quant: WeightQuant) -> np.ndarray:
    steps = weight.astype(np.float32) / expand(quant.scale.astype(np.float32), quant, weight.shape)
    if quant.codebook:
        grid = codebook(quant.codebook)
        return grid.index(steps) if is_indexed(quant) else grid.nearest(steps)
    middle = 2 ** (quant.bits - 1) if quant.dtype.startswith("uint") else 0
    zero = (
        np.int16(middle)
        if quant.zero_point is None
        else expand(quant.zero_point.astype(np.int16), quant, weight.shape)
    )
    low, high = integer_range(quant)
    integers: np.ndarray = np.clip(np.rint(steps) + zero, low, high)
    return integers


@dataclass(frozen=True)
class RoundNearest:
    """Quantize the weight operand of every node that the plan gives a format.

    Attributes:
        plan: Names the weight of each node and its scales.
    """

    plan: Plan

    @property
    def name(self) -> str:
        """The pass's name."""
        return "round_nearest"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        fresh = FreshNames(model)
        done: dict[str, Callable[[], ir.Value]] = {}
        changed = 0
        for node in list(model.graph):
            decision = self.plan.nodes.get(node_label(node))
            weight = weight_of(node)
            if decision is None or not decision.weight or weight is None:
                continue
            if decision.weight not in done:
                quant = self.plan.weights[decision.weight]
                integers = round_to_nearest(weight_array(weight), quant)
                done[decision.weight] = store_weight(model, weight.name or "weight", integers, quant, fresh)
            node.replace_input_with(1, done[decision.weight]())
            changed += 1
        return PassResult(model, changed)
