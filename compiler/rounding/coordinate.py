"""Rounding up or down by coordinate descent on the output error, without gradients."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.rounding.grid import Quantizer
from bitwright.compiler.rounding.objective import check_weights, normal_form, output_error

SWEEPS = 4
BLOCK = 128


def refine(
    weights: NDArray[np.float32],
    levels: NDArray[np.float32],
    objective: NDArray[np.float64],
    quantizer: Quantizer,
    *,
    sweeps: int = SWEEPS,
    block: int = BLOCK,
) -> NDArray[np.float32]:
    """Move levels by one step at a time while ``(w - q)^T H (w - q)`` falls.

    The problem is AdaRound's quadratic binary one (Nagel et al. 2020, "Up or Down?", section 3.2), here solved by
    cyclic coordinate descent over the inputs, all outputs side by side (Behdin et al. 2023, "QuantEase", section
    3): with the others fixed, the best real value of weight i is ``q_i + (H (w - q))_i / H_ii``; its level is the
    neighbour (or the present one) nearest to it. No column's error ever rises; sweeps end when nothing moves.

    Args:
        weights: float32, shape (G, K, N).
        levels: Where to start, float32, shape (G, K, N).
        objective: H, float64, shape (G, K, K), positive diagonal.
        quantizer: Grid, scales, zero points.
        sweeps: Most rounds over all inputs.
        block: Inputs whose moves are kept aside until one matrix product brings the gradient up to date.

    Returns:
        Levels, float32, shape (G, K, N).

    Raises:
        ModelError: A weight is not finite.
    """
    check_weights(weights)
    current = levels.copy()
    form, _ = normal_form(objective)
    for _ in range(sweeps):
        if not _sweep(weights, current, form, quantizer, block):
            break
    return _keep_better(weights, levels, current, objective, quantizer)


def _sweep(
    weights: NDArray[np.float32],
    levels: NDArray[np.float32],
    form: NDArray[np.float32],
    quantizer: Quantizer,
    block: int,
) -> bool:
    """Visit every input once; tell whether anything moved."""
    depth = weights.shape[1]
    scale = np.broadcast_to(quantizer.row_scale(depth), weights.shape)
    residual = weights - quantizer.dequantize(levels)
    moved = False
    for start in range(0, depth, block):
        stop = min(start + block, depth)
        gradient = form[:, start:stop] @ residual
        moves = np.zeros_like(gradient)  # what was added to the real weights of this block
        for k in range(start, stop):
            pull = gradient[:, k - start]
            if k > start:
                pull = pull - (form[:, k : k + 1, start:k] @ moves[:, : k - start])[:, 0]
            wanted: NDArray[np.float32] = levels[:, k] + pull / (form[:, k, k, None] * scale[:, k])
            step = _step(levels[:, k], wanted, quantizer)
            levels[:, k] += step
            moves[:, k - start] = step * scale[:, k]
            moved = moved or bool(step.any())
        residual[:, start:stop] -= moves
    return moved


def _step(
    level: NDArray[np.float32], wanted: NDArray[np.float32], quantizer: Quantizer
) -> NDArray[np.float32]:
    """Return the change to the neighbouring level on the side of ``wanted`` where that is nearer."""
    grid = quantizer.grid
    if grid.uniform:
        step: NDArray[np.float32] = np.clip(grid.nearest(wanted) - level, -1.0, 1.0)
        return step
    here = grid.index(level)
    there = here + np.clip(grid.index(wanted) - here, -1, 1)
    change: NDArray[np.float32] = (grid.values[there] - level).astype(np.float32)
    return change


def _keep_better(
    weights: NDArray[np.float32],
    before: NDArray[np.float32],
    after: NDArray[np.float32],
    objective: NDArray[np.float64],
    quantizer: Quantizer,
) -> NDArray[np.float32]:
    """Guard each column against what float32 sums may get wrong where a move gains next to nothing."""
    old = output_error(objective, weights - quantizer.dequantize(before))
    new = output_error(objective, weights - quantizer.dequantize(after))
    return np.where((new <= old)[:, None, :], after, before)
