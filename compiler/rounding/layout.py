"""Weights of MatMul, Gemm and Conv as matrices (G, K, N), the form in which everything here works."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def as_matrices(weight: NDArray[np.generic], groups: int, *, conv: bool) -> NDArray[np.generic]:
    """Return a weight as G matrices [K, N].

    Args:
        weight: [K, N], or of a convolution [Cout, Cin/G, *kernel].
        groups: G; 1 for MatMul and Gemm.
        conv: The weight is a convolution's.
    """
    if not conv:
        return weight[None]
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    return np.ascontiguousarray(rows.transpose(0, 2, 1))


def from_matrices(
    matrices: NDArray[np.generic], shape: tuple[int, ...], *, conv: bool
) -> NDArray[np.generic]:
    """Return matrices (G, K, N) as the weight of ``shape`` that they were made from."""
    return matrices.transpose(0, 2, 1).reshape(shape) if conv else matrices[0]
