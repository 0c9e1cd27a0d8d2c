"""GPTQ: rounding one input at a time, each error made good by the inputs that are still to be rounded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import DataError
from bitwright.compiler.rounding.grid import Quantizer
from bitwright.compiler.rounding.objective import DAMPING, check_weights, damped, error_in, normal_form

BLOCK = 128
LARGEST_DAMPING = 1.0
# Weights that are rounded at once: a dozen arrays of this size exist meanwhile.
COLUMN_ELEMENTS = 1 << 20
# Rows of a factorization that are done at once; smaller matrices are factored as a whole.
PANEL = 1024


@dataclass(frozen=True, eq=False)
class Feedback:
    """How rounding errors pass on, for all weights that multiply one input.

    Attributes:
        objective: The damped moment H, float64, shape (G, K, K).
        order: Inputs in the order they are rounded, shape (G, K).
        share: float32, shape (G, K, K), strictly lower triangular: the part of the j-th error, in rounding
            order, that is added to the i-th weight.
        damping: What made the factorization succeed.
    """

    objective: NDArray[np.float64]
    order: NDArray[np.intp]
    share: NDArray[np.float32]
    damping: float


def factorize(
    second: NDArray[np.float64] | NDArray[np.float32],
    *,
    damping: float = DAMPING,
    shrinkage: float = 0.0,
    act_order: bool = True,
) -> Feedback:
    """Factor the second moment of an input.

    GPTQ (Frantar et al. 2022, section 3.3, steps 1 to 3) adds ``e_j U_ji / U_jj`` to the later weights, U the upper
    Cholesky factor of H^-1. With ``H = M M^T``, M upper triangular, the same feedback is
    ``sum_j M_ji / M_ii (w_j - q_j)``: no inverse is needed, and H is factored once (Chen et al. 2025, "The Geometry
    of LLM Quantization: GPTQ as Babai's Nearest Plane Algorithm").

    Args:
        second: E[x x^T], shape (G, K, K).
        damping: Share of the mean diagonal that is added; times 10, up to 1, while the factorization fails.
        shrinkage: Share of the correlations that is given up, see
            :func:`bitwright.compiler.rounding.objective.shrinkage_of`.
        act_order: Round inputs of large power first (the rule of GPTQ's reference code), else in storage order.

    Raises:
        DataError: The moment is not finite, or no damping makes it positive definite.
    """
    while True:
        order, form = _ordered_form(second, damping, shrinkage, act_order)
        try:
            share = _share(form)
        except np.linalg.LinAlgError:
            if damping * 10 > LARGEST_DAMPING:
                msg = "the second moment of an input is not positive definite, whatever the damping"
                raise DataError(msg, where="calibration data", fix="give more or other samples") from None
            damping *= 10
            continue
        del form
        # Made anew: the factor took the place of the first one, which may be hundreds of megabytes.
        return Feedback(damped(second, damping, shrinkage), order, share, damping)


def _order(objective: NDArray[np.float64], act_order: bool) -> NDArray[np.intp]:
    diagonal = np.einsum("gkk->gk", objective)
    if act_order:
        return np.argsort(-diagonal, axis=1, kind="stable")
    return np.broadcast_to(np.arange(diagonal.shape[1]), diagonal.shape)


def _ordered_form(
    second: NDArray[np.float64] | NDArray[np.float32], damping: float, shrinkage: float, act_order: bool
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the order of rounding, and the damped moment in the reverse of it."""
    form = damped(second, damping, shrinkage)
    order = _order(form, act_order)
    for matrix, places in zip(form, order[:, ::-1], strict=True):
        matrix[...] = matrix[np.ix_(places, places)]
    return order, form


def _share(form: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return what :class:`Feedback` calls share; the form is used up."""
    share = np.empty(form.shape, np.float32)
    for lower, found in zip(form, share, strict=True):
        _factor_in_place(lower)
        upper = lower[::-1, ::-1]
        divisor = np.diagonal(upper)
        for start in range(0, len(upper), PANEL):
            rows = upper[:, start : start + PANEL].T / divisor[start : start + PANEL, None]
            found[start : start + PANEL] = np.tril(rows, start - 1)
    return share


def _factor_in_place(matrix: NDArray[np.float64]) -> None:
    """Put the lower Cholesky factor into the lower triangle of a matrix; what is above it means nothing afterwards.

    Panel by panel: with thousands of inputs a matrix is hundreds of megabytes, and LAPACK's callers copy it twice.
    """
    size = len(matrix)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        corner = matrix[start:stop, start:stop]
        corner[...] = np.linalg.cholesky(corner)
        below = matrix[stop:, start:stop]
        if len(below):
            below[...] = np.linalg.solve(corner, below.T).T
        for left in range(stop, size, PANEL):
            row = left - stop
            matrix[left:, left : left + PANEL] -= below[row:] @ below[row : row + PANEL].T


def gptq(
    weights: NDArray[np.float32], feedback: Feedback, quantizer: Quantizer, *, block: int = BLOCK
) -> NDArray[np.float32]:
    """Round weight matrices so that ``(w - q)^T H (w - q)`` is small.

    Scales and zero points are fixed before ("static groups"), so the order of rounding does not touch the layout.
    A column whose error would be larger than with rounding to nearest is rounded to nearest: the result is never
    the worse one. An input that was always zero takes part in no feedback and is rounded to nearest, too, since
    it may not be zero for ever.

    Args:
        weights: float32, shape (G, K, N).
        feedback: From :func:`factorize`, of the same G and K.
        quantizer: Grid, scales, zero points.
        block: Rows that are rounded before their errors are added to the rest by one matrix product (section
            3.3, step 2).

    Returns:
        Levels, float32, shape (G, K, N).

    Raises:
        ModelError: A weight is not finite.
    """
    check_weights(weights)
    normal = normal_form(feedback.objective)
    groups, depth, columns = weights.shape
    step = max(1, COLUMN_ELEMENTS // (groups * depth))
    parts = [slice(n, n + step) for n in range(0, columns, step)]
    rounded = [_better(weights[:, :, p], feedback, normal, quantizer.columns(p), block) for p in parts]
    return rounded[0] if len(rounded) == 1 else np.concatenate(rounded, axis=2)


def _better(
    weights: NDArray[np.float32],
    feedback: Feedback,
    normal: tuple[NDArray[np.float32], NDArray[np.float64]],
    quantizer: Quantizer,
    block: int,
) -> NDArray[np.float32]:
    """Return for each column the better of the levels with feedback and the nearest ones."""
    levels = _with_feedback(weights, feedback, quantizer, block)
    error = error_in(normal, weights - quantizer.dequantize(levels))
    nearest = quantizer.nearest(weights)
    better = error <= error_in(normal, weights - quantizer.dequantize(nearest))
    return np.where(better[:, None, :], levels, nearest)


def _with_feedback(
    weights: NDArray[np.float32], feedback: Feedback, quantizer: Quantizer, block: int
) -> NDArray[np.float32]:
    depth = weights.shape[1]
    order = feedback.order[:, :, None]
    scale = _ordered(quantizer.row_scale(depth), order, weights.shape)
    zero = _ordered(quantizer.row_zero_point(depth), order, weights.shape)
    target = np.take_along_axis(weights, order, axis=1)
    levels = np.empty_like(target)
    residual = np.zeros_like(target)  # w - q of what is rounded
    for start in range(0, depth, block):
        stop = min(start + block, depth)
        wanted = target[:, start:stop] + feedback.share[:, start:stop, :start] @ residual[:, :start]
        for k in range(start, stop):
            row = wanted[:, k - start]
            if k > start:
                inside = feedback.share[:, k : k + 1, start:k]
                row = row + (inside @ residual[:, start:k])[:, 0]
            levels[:, k] = quantizer.grid.nearest(row / scale[:, k] + zero[:, k])
            residual[:, k] = target[:, k] - (levels[:, k] - zero[:, k]) * scale[:, k]
    result = np.empty_like(levels)
    np.put_along_axis(result, order, levels, axis=1)
    return result


def _ordered(
    values: NDArray[np.float32] | np.float32, order: NDArray[np.intp], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Return per-row values in rounding order, as a view of shape (G, K, N)."""
    array = np.asarray(values, np.float32)
    if array.ndim == 3 and array.shape[1] > 1:
        whole = np.broadcast_to(array, (shape[0], shape[1], array.shape[2]))
        array = np.take_along_axis(whole, order, axis=1)
    return np.broadcast_to(array, shape)
