"""How many weights share a scale, chosen weight by weight: what a finer grid saves against the bits its scales take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from bitwright.compiler.moments import InputMoments
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.plan.weight_grids import grid_of, matrices_of
from bitwright.compiler.plan.weight_search import importance_of, readers_of
from bitwright.compiler.rounding.grid import Grid, Quantizer
from bitwright.compiler.rounding.scale_search import Layout, search_scales, weighted_error

SCALE_BITS = 32


def choose_granularity(plan: Plan, model: ir.Model, moments: Mapping[str, InputMoments]) -> Plan:
    """Return the plan with the best group length, with or without zero points, for every grouped weight.

    A bit more for every weight quarters the error of a uniform grid (6 dB), so the layout of least
    ``error * 4^(bits of scales and zero points for each weight)`` is the one that no uniform change of widths
    could improve: the rate-distortion rule for a fixed size.

    Args:
        plan: Not changed; ``WeightQuant.menu`` says which lengths the kernel takes.
        model: The float model that the plan was made for.
        moments: Input moments by node name; may lack any.
    """
    weights = dict(plan.weights)
    for key, nodes in readers_of(plan, model).items():
        if len(weights[key].menu) > 1:
            weights[key] = _best(weights[key], nodes, moments)
    return replace(plan, weights=weights)


def _best(quant: WeightQuant, nodes: Sequence[ir.Node], moments: Mapping[str, InputMoments]) -> WeightQuant:
    weights = matrices_of(nodes[0])
    assert weights is not None
    importance = importance_of(nodes, moments, weights.shape[:2])
    best, least = quant, np.inf
    for candidate in _candidates(quant):
        grid = _grid(candidate)
        if grid is None:
            continue
        layout = Layout(candidate.group, zero_points=candidate.zero_point is not None)
        found = search_scales(weights, importance, grid, layout)
        cost = weighted_error(weights, importance, found) * 4.0 ** _overhead_bits(candidate)
        if cost < least:
            best, least = _with(candidate, found), cost
    return best


def _candidates(quant: WeightQuant) -> list[WeightQuant]:
    """Return the entry with every length, the cheapest first, without zero points where it may have them."""
    plain = [replace(quant, group=g, zero_point=None) for g in sorted(quant.menu, reverse=True)]
    if quant.zero_point is None:
        return plain
    return [*plain, *(replace(p, zero_point=quant.zero_point) for p in plain)]


def _grid(quant: WeightQuant) -> Grid | None:
    """Return the levels; of an unsigned type without zero points those around its middle."""
    grid = grid_of(quant)
    if (
        grid is not None
        and quant.dtype.startswith("uint")
        and quant.zero_point is None
        and not quant.codebook
    ):
        return Grid(grid.name, grid.values - 2 ** (quant.bits - 1))
    return grid


def _overhead_bits(quant: WeightQuant) -> float:
    point = quant.bits if quant.zero_point is not None else 0
    return (SCALE_BITS + point) / quant.group


def _with(quant: WeightQuant, found: Quantizer) -> WeightQuant:
    zero = None
    if quant.zero_point is not None and found.zero_point is not None:
        zero = np.rint(found.zero_point[0]).astype(quant.zero_point.dtype)
    return replace(quant, scale=found.scale[0].astype(np.float32), zero_point=zero)
