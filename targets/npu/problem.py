"""A Gemm or convolution as the matrix products that the array computes, and its constants in the array's order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from bitwright.compiler.errors import ModelError, PerformanceGateError
from bitwright.compiler.interpret.fixed_point import FixedPoint, fixed_point
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.npu.machine import LONGEST_SHIFT, MULTIPLIER_BITS, Machine

INT32 = 2**31
# TensorIR drops loops of one iteration, and with them the shape of an intrinsic: tiles have two words at least.
SHORTEST = 2


@dataclass(frozen=True)
class Problem:
    """Products of matrices: for every group ``[pixels, depth] x [depth, outputs]``.

    Convolutions with few channels a group, above all depthwise ones, have several groups put together: the weights
    between channels of different groups are zeros. That costs steps, but fills the columns.

    Attributes:
        groups: Products, after putting together.
        merged: Groups of the convolution that are one here.
        pixels: Rows of the products.
        depth: Length of the reduction, zeros included.
        outputs: Channels of one product.
        macs: Multiply-accumulates that the model asks for.
    """

    groups: int
    merged: int
    pixels: int
    depth: int
    outputs: int
    macs: int


def problem_of(geometry: DotGeometry, machine: Machine) -> Problem:
    """Return the products that a step is computed by."""
    merged = max(1, min(geometry.group, machine.columns // geometry.group_outputs))
    groups = -(-geometry.group // merged)
    depth = prod(geometry.kernel) * geometry.group_channels * merged
    outputs = geometry.group_outputs * merged
    return Problem(groups, merged, geometry.pixels, depth, outputs, geometry.macs)


def packed_weights(step: Dot, geometry: DotGeometry, problem: Problem, machine: Machine) -> np.ndarray:
    """Return int8 [groups, blocks of columns, depth rounded up, columns], zeros where there is nothing.

    Raises:
        ModelError: A weight is wider than the array's.
    """
    limit = 1 << (machine.weight_bits - 1)
    if int(step.weight.min(initial=0)) < -limit or int(step.weight.max(initial=0)) >= limit:
        what = f"a weight does not fit the array's {machine.weight_bits} bits"
        raise ModelError(what, where=step.name, fix="choose a format with narrower weights, or a wider array")
    g = geometry
    taps = prod(g.kernel)
    rows = step.weight.T if step.weight.ndim == 2 else step.weight.transpose(0, 2, 3, 1)
    rows = rows.reshape(g.group, g.group_outputs, taps, g.group_channels)
    whole = np.zeros((problem.groups * problem.merged, *rows.shape[1:]), np.int8)
    whole[: g.group] = rows
    own = whole.reshape(problem.groups, problem.merged, *rows.shape[1:])
    # [group, tap, merged in, channel, merged out, output]: zero unless both are of one group of the convolution.
    spread = np.zeros(
        (problem.groups, taps, problem.merged, g.group_channels, problem.merged, g.group_outputs), np.int8
    )
    for part in range(problem.merged):
        spread[:, :, part, :, part, :] = own[:, part].transpose(0, 2, 3, 1)
    matrix = spread.reshape(problem.groups, problem.depth, problem.outputs)
    return _in_blocks(matrix, problem, machine)


def padded_depth(problem: Problem, machine: Machine) -> int:
    """Return the depth that is computed: weight stationary arrays take as many rows as they have at once."""
    if machine.weight_stationary:
        return -(-problem.depth // machine.rows) * machine.rows
    return max(problem.depth, SHORTEST)


def output_blocks(problem: Problem, machine: Machine) -> int:
    """Return the blocks of columns that the outputs of a product take."""
    return -(-problem.outputs // machine.columns)


def _in_blocks(matrix: np.ndarray, problem: Problem, machine: Machine) -> np.ndarray:
    blocks, depth = output_blocks(problem, machine), padded_depth(problem, machine)
    padded = np.zeros((problem.groups, depth, blocks * machine.columns), np.int8)
    padded[:, : problem.depth, : problem.outputs] = matrix
    split = padded.reshape(problem.groups, depth, blocks, machine.columns)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3))


def multipliers(step: Dot, program: Program, bits: int = MULTIPLIER_BITS) -> FixedPoint:
    """Return the fixed-point multipliers [outputs] of a step with an integer output.

    Raises:
        PerformanceGateError: Its output is float.
    """
    source, output = program.tensor(step.inputs[0]).quant, program.tensor(step.output).quant
    assert source is not None
    if output is None:
        what = "the array writes 8-bit integers, and this layer's output is float"
        raise PerformanceGateError(what, where=step.name, fix="let the profile's kernel write 'out: [a8]'")
    real = np.float64(source.scale) * step.weight_scale.astype(np.float64) / np.float64(output.scale)
    channels = step.weight.shape[1] if step.weight.ndim == 2 else step.weight.shape[0]
    return fixed_point(np.broadcast_to(real, (channels,)), bits)


def full_bias(step: Dot, program: Program) -> np.ndarray:
    """Return int64 [outputs]: the bias, less what the zero point of the activations adds to the sums.

    Raises:
        ModelError: A sum may not fit 32 bits.
    """
    source = program.tensor(step.inputs[0]).quant
    assert source is not None
    axes = 0 if step.weight.ndim == 2 else (1, 2, 3)
    weight = step.weight.astype(np.int64)
    bias = -source.zero_point * weight.sum(axis=axes)
    if step.bias is not None:
        bias = bias + step.bias.astype(np.int64)
    if (np.abs(bias) + 128 * np.abs(weight).sum(axis=axes)).max(initial=0) >= INT32:
        what = "a sum of products may not fit 32 bits"
        raise ModelError(what, where=step.name, fix="leave this layer in float with --keep-float")
    return np.asarray(bias)


def packed_parameters(step: Dot, program: Program, problem: Problem, machine: Machine) -> np.ndarray:
    """Return int32 [groups, blocks, 3, columns]: bias, multiplier and shift of every channel."""
    by = multipliers(step, program)
    shift = np.minimum(by.shift, LONGEST_SHIFT)
    rows = np.stack([full_bias(step, program), by.multiplier, shift]).astype(np.int32)
    blocks = output_blocks(problem, machine)
    padded = np.zeros((3, problem.groups * problem.outputs), np.int32)
    padded[2] = 1  # a shift by no place does not exist
    padded[:, : rows.shape[1]] = rows
    split = np.zeros((3, problem.groups, blocks * machine.columns), np.int32)
    split[2] = 1
    split[:, :, : problem.outputs] = padded.reshape(3, problem.groups, problem.outputs)
    ordered = split.reshape(3, problem.groups, blocks, machine.columns).transpose(1, 2, 0, 3)
    return np.ascontiguousarray(ordered)
