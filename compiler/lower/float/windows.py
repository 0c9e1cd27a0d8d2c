"""Windows that slide over channels-last images: tiles of output pixels, the image's edges, what ends a sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float.storage import load
from bitwright.compiler.lower.float.vectors import number
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, Parameter

# Starting and joining threads costs microseconds: about what a million multiply-accumulates cost on one core.
MIN_PARALLEL_WORK = 1 << 19


@dataclass(frozen=True)
class Ending:
    """What happens to a finished sum, in this order.

    Attributes:
        bias: A vector [outputs] is added.
        residual: A tensor of the result's shape is added.
        low, high: The result is clamped to this range.
        dtype: How images are stored, ``"float32"`` or ``"float16"``.
        weight_dtype: How weights are.
    """

    bias: bool = False
    residual: bool = False
    low: float = -inf
    high: float = inf
    dtype: str = "float32"
    weight_dtype: str = "float32"

    def parameters(self, geometry: DotGeometry) -> list[Parameter]:
        """Return what the ending reads, in the order of the call."""
        found = [Parameter("bias", (geometry.outputs,), "float32")] if self.bias else []
        other = [Parameter("residual", geometry.output_shape, self.dtype)] if self.residual else []
        return [*found, *other]

    def emit(self, value: Expr, read: Sequence[Buffer], channel: Expr, at: Expr, lanes: int) -> Expr:
        """Return what is stored.

        Args:
            value: The sum.
            read: Buffers of ``parameters``.
            channel: First output channel.
            at: Position of the result in its buffer.
            lanes: Of the vector.
        """
        if self.bias:
            value = value + load(read[0], [channel], lanes)
        if self.residual:
            value = value + load(read[-1], [at], lanes)
        if self.low > -inf:
            value = T.max(value, number(self.low, lanes))
        return T.min(value, number(self.high, lanes)) if self.high < inf else value


@dataclass(frozen=True)
class Strip:
    """Tiles of one form in every row of output pixels.

    Attributes:
        first: Output column of the first tile.
        count: Tiles in a row.
        pixels: Output pixels of a tile.
        inside: For each horizontal position of the kernel, the pixels for which it lies in the image.
    """

    first: int
    count: int
    pixels: int
    inside: tuple[tuple[int, ...], ...]

    @property
    def whole(self) -> bool:
        """No pixel reaches over an edge."""
        return all(len(pixels) == self.pixels for pixels in self.inside)


def strips(geometry: DotGeometry, pixels: int) -> list[Strip]:
    """Cut rows of output pixels into tiles; neighbours that meet no edge are one strip."""
    found: list[Strip] = []
    for first in range(0, geometry.out_width, pixels):
        size = min(pixels, geometry.out_width - first)
        tile = Strip(first, 1, size, _inside(geometry, first, size))
        last = found[-1] if found else None
        if last and last.whole and tile.whole and last.pixels == size:
            found[-1] = Strip(last.first, last.count + 1, size, last.inside)
        else:
            found.append(tile)
    return found


def _inside(geometry: DotGeometry, first: int, size: int) -> tuple[tuple[int, ...], ...]:
    stride, left = geometry.strides[1], geometry.pads[1]
    starts = [(first + pixel) * stride - left for pixel in range(size)]
    steps = [k * geometry.dilations[1] for k in range(geometry.kernel[1])]
    return tuple(
        tuple(pixel for pixel, start in enumerate(starts) if 0 <= start + step < geometry.width)
        for step in steps
    )


def leaves_rows(geometry: DotGeometry) -> bool:
    """Tell whether some window reaches over the upper or lower edge."""
    lowest = (geometry.out_height - 1) * geometry.strides[0] - geometry.pads[0]
    return (
        geometry.pads[0] > 0 or lowest + (geometry.kernel[0] - 1) * geometry.dilations[0] >= geometry.height
    )


@contextmanager
def kernel_rows(geometry: DotGeometry, top: Expr) -> Iterator[Expr]:
    """Open a loop over the kernel's rows that lie in the image.

    Args:
        geometry: Of the windows.
        top: Image row of the window's first row; negative above the upper edge.
    """
    with T.serial(geometry.kernel[0]) as row:
        if not leaves_rows(geometry):
            yield row
            return
        at = top + row * geometry.dilations[0]
        with T.If(tirx.And(at >= 0, at < geometry.height)), T.Then():
            yield row


def padded_columns(columns: int, lanes: int) -> int:
    """Return how many columns are computed for so many: full vectors, then the next power of two."""
    rest = columns % lanes
    return columns - rest + (1 << (rest - 1).bit_length() if rest else 0)
