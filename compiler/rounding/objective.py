"""The error that rounding minimises: the mean square change of a layer's output, as a quadratic form."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import DataError, ModelError

DAMPING = 0.01


def damped(second: NDArray[np.float64], damping: float = DAMPING) -> NDArray[np.float64]:
    """Return ``H = E[x x^T] + damping * mean(diag) * I``; inputs that were always zero get the mean itself.

    ``(w - q)^T H (w - q)`` is the mean square error of one output over the calibration rows (Nagel et al. 2020,
    "Up or Down?", section 3.2) plus what keeps few rows from being fitted too closely (Frantar et al. 2022,
    "GPTQ", section 3.3).

    Args:
        second: float64, shape (G, K, K).
        damping: Share of the mean diagonal.

    Raises:
        DataError: The moment is not finite.
    """
    if not np.isfinite(second).all():
        msg = "the second moment of an input is not finite"
        raise DataError(msg, where="calibration data", fix="check the samples for NaN or infinity")
    found = second.copy()
    diagonal = np.einsum("gkk->gk", found)
    mean = diagonal.mean(axis=1, keepdims=True)
    mean = np.where(mean > 0, mean, 1.0)
    dead = diagonal <= 0
    diagonal += damping * mean
    diagonal[dead] = np.broadcast_to(mean, diagonal.shape)[dead]
    return found


def output_error(objective: NDArray[np.float64], residual: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ``r^T H r`` for each column of residuals (G, K, N), shape (G, N)."""
    wide = residual.astype(np.float64)
    found: NDArray[np.float64] = np.einsum("gkn,gkn->gn", objective @ wide, wide)
    return found


def check_weights(weights: NDArray[np.float32]) -> None:
    """Refuse weights that are not finite.

    Raises:
        ModelError: A weight is NaN or infinite.
    """
    if not np.isfinite(weights).all():
        msg = "a weight is NaN or infinite and cannot be rounded"
        raise ModelError(msg, where="weights", fix="repair the model, or keep the node in float")
