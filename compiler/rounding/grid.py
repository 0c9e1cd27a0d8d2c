"""What values a quantized weight may take, and the map between them and real numbers.

A *level* is what is stored before scaling: an integer, or an entry of a codebook. A weight is
``(level - zero_point) * scale``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import InternalError, UsageError, nearest

Array = NDArray[np.floating]

# Quantiles of the normal distribution, asymmetric around an exact zero (Dettmers et al. 2023, "QLoRA", appendix E).
NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, eq=False)
class Grid:
    """The levels of a format, in ascending order.

    Attributes:
        name: For example ``"int4"`` or ``"nf4"``.
        values: The levels, float64, ascending, shape (levels,).
    """

    name: str
    values: NDArray[np.float64]

    @cached_property
    def uniform(self) -> bool:
        """The levels are consecutive integers."""
        return bool((np.diff(self.values) == 1).all() and float(self.values[0]).is_integer())

    @property
    def low(self) -> float:
        """The smallest level."""
        return float(self.values[0])

    @property
    def high(self) -> float:
        """The largest level."""
        return float(self.values[-1])

    @property
    def reach(self) -> float:
        """The largest magnitude that is there with both signs: ``max|w| / reach`` covers w without a zero point."""
        return min(-self.low, self.high) if self.low < 0 else self.high

    @cached_property
    def _middles(self) -> NDArray[np.float64]:
        return (self.values[1:] + self.values[:-1]) / 2

    def nearest(self, steps: Array) -> Array:
        """Return the level nearest to each number, in its dtype; a tie goes to the even level.

        For a codebook "even" counts from the level nearest to zero, which for the floating-point formats is
        round-half-to-even of the mantissa.
        """
        if self.uniform:
            found: Array = np.rint(steps)
            np.clip(found, self.low, self.high, out=found)
            return found
        return self.values[self.index(steps)].astype(steps.dtype)

    def index(self, steps: Array) -> NDArray[np.intp]:
        """Return the position of the nearest level of each number."""
        found = np.searchsorted(self._middles, steps, side="left")
        tie = steps == np.append(self._middles, np.inf)[found]
        odd = (found - int(np.abs(self.values).argmin())) % 2 != 0
        positions: NDArray[np.intp] = found + (tie & odd)
        return positions


def integer_grid(bits: int, *, signed: bool = True, narrow: bool = False) -> Grid:
    """Return the integers of a width.

    Args:
        bits: 1 to 8.
        signed: Two's complement, else from zero.
        narrow: Leave out the smallest, so that signed integers are symmetric.

    Raises:
        UsageError: The width is out of range, or a narrow 1-bit grid would have one level only.
    """
    if not 1 <= bits <= 8 or (narrow and bits == 1):
        msg = f"there is no{' narrow' if narrow else ''} integer grid of {bits} bits"
        raise UsageError(msg, fix="use 1 to 8 bits; for one bit use the binary codebook")
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.arange(low + narrow, low + 2**bits, dtype=np.float64)
    return Grid(f"{'int' if signed else 'uint'}{bits}", values)


def _float_grid(name: str, exponent_bits: int, mantissa_bits: int, largest: float) -> Grid:
    """Return all finite values of a small floating-point format with subnormals."""
    bias = 2 ** (exponent_bits - 1) - 1
    fractions = np.arange(2**mantissa_bits) / 2**mantissa_bits
    positive = [fractions * 2.0 ** (1 - bias)]
    positive += [(1 + fractions) * 2.0 ** (e - bias) for e in range(1, 2**exponent_bits)]
    found = np.concatenate(positive)
    found = found[found <= largest]
    return Grid(name, np.concatenate([-found[:0:-1], found]))


CODEBOOKS = ("nf4", "ternary", "binary", "e4m3", "e5m2")


@lru_cache
def codebook(name: str) -> Grid:
    """Return a named codebook: one of :data:`CODEBOOKS`.

    Raises:
        UsageError: The name is unknown.
    """
    if name == "nf4":
        return Grid(name, np.array(NF4_VALUES))
    if name == "ternary":
        return Grid(name, np.array([-1.0, 0.0, 1.0]))
    if name == "binary":
        return Grid(name, np.array([-1.0, 1.0]))
    if name == "e4m3":
        return _float_grid(name, 4, 3, 448.0)
    if name == "e5m2":
        return _float_grid(name, 5, 2, 57344.0)
    msg = f"there is no codebook '{name}'"
    raise UsageError(msg, fix=nearest(name, CODEBOOKS))


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A grid with scales and zero points fixed, for weight matrices of shape (G, K, N).

    Attributes:
        grid: The levels.
        scale: Positive, float32, shape (G or 1, B, N or 1): B = 1, or one for each block of ``group`` rows.
        zero_point: Levels that mean zero, like ``scale``; None for zero.
        group: Rows (of K) that share a scale; 0 when B = 1. The last block may be shorter.
    """

    grid: Grid
    scale: NDArray[np.float32]
    zero_point: NDArray[np.float32] | None = None
    group: int = 0

    def __post_init__(self) -> None:
        if self.scale.ndim != 3 or (self.group == 0 and self.scale.shape[1] != 1):
            msg = f"scales of shape {self.scale.shape} do not fit group {self.group}"
            raise InternalError(msg)

    def row_scale(self, depth: int) -> NDArray[np.float32]:
        """Return the scales for K = ``depth`` rows, shape (., depth or 1, .)."""
        return _by_row(self.scale, self.group, depth)

    def row_zero_point(self, depth: int) -> NDArray[np.float32] | np.float32:
        """Return the zero points in the same form, a scalar 0 where there are none."""
        return np.float32(0) if self.zero_point is None else _by_row(self.zero_point, self.group, depth)

    def columns(self, part: slice) -> Quantizer:
        """Return the quantizer of some of the columns."""
        if self.scale.shape[2] == 1:
            return self
        zero = None if self.zero_point is None else self.zero_point[:, :, part]
        return Quantizer(self.grid, self.scale[:, :, part], zero, self.group)

    def nearest(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the nearest levels of weights (G, K, N), float32."""
        depth = weights.shape[1]
        return self.grid.nearest(weights / self.row_scale(depth) + self.row_zero_point(depth))

    def dequantize(self, levels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return ``(levels - zero_point) * scale``, float32, shape (G, K, N)."""
        depth = levels.shape[1]
        return (levels - self.row_zero_point(depth)) * self.row_scale(depth)


def _by_row(blocks: NDArray[np.float32], group: int, depth: int) -> NDArray[np.float32]:
    return np.repeat(blocks, group, axis=1)[:, :depth] if group else blocks
