"""WeightOnlyDot: activations rounded in blocks, exact sums within a group, fused sums over the groups."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.interpret.fma import fma
from bitwright.compiler.program.ops import SMALLEST_ACTIVATION, WeightOnlyDot

LARGEST = 127


def weight_only_dot(step: WeightOnlyDot, x: np.ndarray) -> np.ndarray:
    """Run a WeightOnlyDot.

    Args:
        step: The step.
        x: float32 [..., K].

    Returns:
        float32 [..., N].
    """
    depth, columns = step.weight.shape
    groups = step.scale.shape[0]
    integers, scale = round_activations(_in_groups(x.reshape(-1, depth), groups, step.group))
    weight = np.zeros((groups * step.group, columns), np.int64)
    weight[:depth] = step.weight
    weight = weight.reshape(groups, step.group, columns) - step.zero_point[:, None, :].astype(np.int64)
    rows = integers.shape[0]
    y = np.zeros((rows, columns), np.float32) if step.bias is None else np.tile(step.bias, (rows, 1))
    for g in range(groups):
        # A group's products stay far below 2**53: float64 sums them exactly, in any order.
        acc = integers[:, g].astype(np.float64) @ weight[g].astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            factor = scale[:, g, None] * step.scale[g]
        y = fma(acc.astype(np.float32), factor, y)
    return y.reshape(*x.shape[:-1], columns)


def _in_groups(rows: np.ndarray, groups: int, length: int) -> np.ndarray:
    """Return float32 [M, groups, length]; zeros fill the last group."""
    padded = np.zeros((rows.shape[0], groups * length), np.float32)
    padded[:, : rows.shape[1]] = rows
    return padded.reshape(rows.shape[0], groups, length)


def round_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round the groups of activations to 8 bits.

    Args:
        x: float32 [M, G, length].

    Returns:
        int8 [M, G, length] (0 where the scale is NaN) and float32 scales [M, G].
    """
    # Bit patterns of magnitudes are ordered as the numbers are, infinity and NaN last.
    bits = (x.view(np.int32) & 0x7FFFFFFF).max(axis=-1, initial=0)
    top = bits.view(np.float32)
    finite = np.isfinite(top)
    scale = np.where(finite, top / np.float32(LARGEST), np.float32(np.nan)).astype(np.float32)
    usable = finite & (top >= np.float32(SMALLEST_ACTIVATION))
    reciprocal = np.float32(LARGEST) / np.where(usable, top, np.float32(1))
    steps = np.rint(np.where(usable[..., None], x, np.float32(0)) * reciprocal[..., None])
    return steps.astype(np.int8), scale
