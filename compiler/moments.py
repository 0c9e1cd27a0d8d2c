"""What is known about the inputs of an anchor (MatMul, Gemm or Conv with a constant weight), as numbers only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Moments of the K-long rows that an anchor multiplies with its weight matrices.

    A MatMul or Gemm has one matrix [K, N]; a Conv with weight [Cout, Cin/g, kh, kw] has g matrices
    [K = Cin/g * kh * kw, Cout/g], and its rows are the patches of the padded input. All arrays carry a leading
    group axis G, which is 1 for MatMul, Gemm and an ordinary Conv.

    Attributes:
        count: Rows seen: tokens, or patches.
        mean: Mean row, float64, shape (G, K).
        second: Mean of the outer product of a row with itself (not centred), float64, or float32 above 128 MiB, shape
            (G, K, K).
        largest: Largest magnitude of each element, float32, shape (G, K).
        rows: Some of the rows, evenly spaced over all of them, float32, shape (n, G, K).
    """

    count: int
    mean: NDArray[np.float64]
    second: NDArray[np.float64] | NDArray[np.float32]
    largest: NDArray[np.float32]
    rows: NDArray[np.float32]

    @property
    def groups(self) -> int:
        """G, the number of weight matrices."""
        return int(self.mean.shape[0])

    @property
    def depth(self) -> int:
        """K, the length of a row."""
        return int(self.mean.shape[1])

    @property
    def power(self) -> NDArray[np.float64]:
        """Mean square of each element, float64, shape (G, K)."""
        return np.diagonal(self.second, axis1=1, axis2=2)


@dataclass(frozen=True, eq=False)
class ChannelStatistics:
    """What is known about each channel (axis 1) of an activation; all arrays have shape (C,), float64.

    Attributes:
        low: Lower end of the range, <= 0, without the rarest extremes.
        high: Upper end, >= 0.
        power: Mean square.
        active: Share of values that are not zero.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    power: NDArray[np.float64]
    active: NDArray[np.float64]
