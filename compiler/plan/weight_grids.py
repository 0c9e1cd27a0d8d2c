"""A plan's weight entries in the terms of the rounding engine: a grid, and scales in matrix form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import int_attribute
from bitwright.compiler.graph.operands import weight_array, weight_of
from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.rounding.grid import Grid, Quantizer, codebook, integer_grid
from bitwright.compiler.rounding.layout import as_matrices, from_matrices
from bitwright.compiler.rounding.scale_search import Layout

_FLOAT8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def grid_of(quant: WeightQuant) -> Grid | None:
    """Return what values the levels of a weight may take, None where it is not rounded to levels at all.

    Kernels of 8-bit products want symmetric integers ([-127, 127]); grouped weights, those with a zero point and
    those of 2 bits use every integer of their width.
    """
    if quant.codebook:
        return codebook(quant.codebook)
    if quant.dtype in _FLOAT8:
        return codebook(_FLOAT8[quant.dtype])
    if "float" in quant.dtype:
        return None
    signed = not quant.dtype.startswith("uint")
    # Two narrow bits would be ternary: there the fourth value is worth more than symmetry.
    narrow = signed and quant.zero_point is None and not quant.group and quant.bits > 2
    return integer_grid(quant.bits, signed=signed, narrow=narrow)


def layout_of(quant: WeightQuant) -> Layout:
    """Return which of its weights share a scale."""
    return Layout(quant.group, quant.axis is None, quant.zero_point is not None)


def matrices_of(node: ir.Node) -> NDArray[np.float32] | None:
    """Return the weight of an anchor as float32 matrices (G, K, N); None where its operands lie otherwise.

    That is a Gemm with a transposed operand, or a weight of a rank that is no matrix.
    """
    weight = weight_of(node)
    if weight is None:
        return None
    array, conv = weight_array(weight), node.op_type == "Conv"
    if array.ndim < 3 if conv else array.ndim != 2:
        return None
    if any(int_attribute(node, name, 0) for name in ("transA", "transB")):
        return None
    groups = int_attribute(node, "group", 1) if conv else 1
    return as_matrices(array, groups, conv=conv).astype(np.float32, copy=False)


def weight_from(matrices: NDArray[np.float32], node: ir.Node) -> NDArray[np.float32]:
    """Return matrices (G, K, N) in the form of the node's weight."""
    weight = weight_of(node)
    assert weight is not None
    return from_matrices(matrices, weight_array(weight).shape, conv=node.op_type == "Conv")  # type: ignore[return-value]


def quantizer_of(quant: WeightQuant, node: ir.Node, groups: int) -> Quantizer | None:
    """Return scales and zero points for :func:`matrices_of`; None where the entry has no levels or lies otherwise.

    Args:
        quant: The weight's entry.
        node: A node that reads it.
        groups: G.
    """
    grid, shape = grid_of(quant), _shape(quant, node, groups)
    if grid is None or shape is None:
        return None
    zero = quant.zero_point
    if zero is None and quant.dtype.startswith("uint") and not quant.codebook:
        zero = np.full(quant.scale.shape, 2 ** (quant.bits - 1))
    return Quantizer(
        grid,
        quant.scale.astype(np.float32).reshape(shape),
        None if zero is None else zero.astype(np.float32).reshape(shape),
        quant.group,
    )


def _shape(quant: WeightQuant, node: ir.Node, groups: int) -> tuple[int, int, int] | None:
    """Return the shape of the scales in matrix form."""
    conv = node.op_type == "Conv"
    if quant.axis is None:
        return (1, 1, 1)
    if quant.group:
        return None if conv or quant.axis != 0 else (1, *quant.scale.shape)
    if quant.axis != (0 if conv else 1):
        return None
    return (groups, 1, quant.scale.size // groups)


def with_scales(quant: WeightQuant, quantizer: Quantizer) -> WeightQuant:
    """Return an entry with the scales and zero points of a quantizer in matrix form."""
    scale, zero = quantizer.scale.reshape(quant.scale.shape), quant.zero_point
    if zero is not None and quantizer.zero_point is not None:
        zero = np.rint(quantizer.zero_point).astype(zero.dtype).reshape(quant.scale.shape)
    return replace(quant, scale=scale, zero_point=zero)
