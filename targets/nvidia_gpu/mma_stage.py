"""From global to shared memory: rows of activations gathered under a convolution's window, rows of packed weights.

A stage holds ``block_m`` rows of activations, then ``block_n`` rows of weights, ``block_k`` bytes each. The 16-byte
pieces of a row are permuted by the row's number, so that the eight rows of a matrix that ldmatrix reads lie in
different banks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, load, store
from bitwright.targets.nvidia_gpu.mma_device import act, pointer, registers
from bitwright.targets.nvidia_gpu.mma_tiles import CHUNK, LINE, Tiling, gather_width

# Far outside of every image: no kernel position brings a row that starts here back into it.
OUTSIDE = -(1 << 24)
WORD = 4


def swizzled(row: Expr, chunk: Expr, tiling: Tiling) -> Expr:
    """Return the byte offset of a 16-byte piece of a row inside its matrix of a stage."""
    rows_per_line = max(1, LINE // tiling.block_k)
    pattern = (row // rows_per_line) % tiling.chunks
    return row * tiling.block_k + (pattern ^ chunk) * CHUNK


@dataclass(frozen=True)
class Share:
    """Which pieces of a matrix of ``rows`` a thread copies: one column of pieces, every ``step``-th row."""

    rows: int
    tiling: Tiling

    @property
    def step(self) -> int:
        """Distance of a thread's rows."""
        return self.tiling.threads // self.tiling.chunks

    @property
    def count(self) -> int:
        """Rows of a thread."""
        return -(-self.rows // self.step)

    @property
    def is_partial(self) -> bool:
        """There are more threads than pieces."""
        return self.step > self.rows

    def column(self, thread: Expr) -> Expr:
        """Return the thread's column of pieces."""
        return thread % self.tiling.chunks

    def row(self, thread: Expr, number: int) -> Expr:
        """Return the thread's row."""
        return thread // self.tiling.chunks + number * self.step


@dataclass(frozen=True)
class WeightStage:
    """Copies packed weights [groups, padded N, padded K] of bytes."""

    tiling: Tiling
    depth_bytes: int

    @property
    def share(self) -> Share:
        """What each thread copies."""
        return Share(self.tiling.block_n, self.tiling)

    def load(self, weight: Buffer, shared: Buffer, at: Expr, row: Expr, step: Expr, thread: Expr) -> None:
        """Emit the copies of one step of the reduction.

        Args:
            weight: Flat bytes.
            shared: The block's shared memory.
            at: Where this matrix of the stage begins in it.
            row: First row of the tile among all groups' padded rows.
            step: Which tile of the reduction.
            thread: Of the block.
        """
        share, t = self.share, self.tiling
        column = share.column(thread)
        for number in range(share.count):
            local = share.row(thread, number)
            source = (row + local) * self.depth_bytes + step * t.block_k + column * CHUNK
            to = pointer(shared, at + swizzled(local, column, t))
            if share.is_partial:
                with T.If(local < t.block_n), T.Then():
                    act("bw_copy_async_16", to, pointer(weight, source), 1)
            else:
                act("bw_copy_async_16", to, pointer(weight, source), 1)


@dataclass(frozen=True)
class RowOrigins:
    """Where a thread's rows of activations begin: registers set once, before the reduction.

    Attributes:
        base: Element index of the window's corner, channels of the group included; may lie outside the image.
        top, left: Coordinates of that corner; None where every position of the window is inside the image.
    """

    base: Buffer
    top: Buffer | None
    left: Buffer | None


@dataclass(frozen=True)
class ActivationStage:
    """Gathers the rows of an implicit matrix product; positions outside the image and past the end are zeros."""

    geometry: DotGeometry
    tiling: Tiling
    element_bytes: int

    @property
    def share(self) -> Share:
        """What each thread copies."""
        return Share(self.tiling.block_m, self.tiling)

    @property
    def width(self) -> int:
        """Bytes of one copy."""
        return gather_width(self.geometry, self.element_bytes)

    @property
    def depth(self) -> int:
        """Elements of the reduction."""
        return prod(self.geometry.kernel) * self.geometry.group_channels

    @property
    def is_inside(self) -> bool:
        """The window never leaves the image and has one position."""
        return self.geometry.kernel == (1, 1) and not any(self.geometry.pads)

    def origins(self, first_row: Expr, group: Expr, thread: Expr) -> RowOrigins:
        """Emit the coordinates of the thread's rows."""
        g, share = self.geometry, self.share
        base = registers(share.count, "int32")
        top, left = (None, None) if self.is_inside else (registers(share.count, "int32") for _ in range(2))
        for number in range(share.count):
            pixel = first_row + share.row(thread, number)
            column, line = pixel % g.out_width, pixel // g.out_width
            y = line % g.out_height * g.strides[0] - g.pads[0]
            x = column * g.strides[1] - g.pads[1]
            corner = (
                (line // g.out_height * g.height + y) * g.width + x
            ) * g.channels + group * g.group_channels
            inside = pixel < g.pixels
            if top is None or left is None:
                store(base, T.Select(inside, corner, OUTSIDE), [number])
            else:
                store(base, corner, [number])
                store(top, T.Select(inside, y, OUTSIDE), [number])
                store(left, x, [number])
        return RowOrigins(base, top, left)

    def load(
        self, x: Buffer, shared: Buffer, at: Expr, origins: RowOrigins, step: Expr, thread: Expr
    ) -> None:
        """Emit the copies of one step of the reduction; arguments as for the weights."""
        share = self.share
        for number in range(share.count):
            local = share.row(thread, number)
            to = at + swizzled(local, share.column(thread), self.tiling)
            if share.is_partial:
                with T.If(local < self.tiling.block_m), T.Then():
                    self._chunk(x, shared, to, origins, number, step, thread)
            else:
                self._chunk(x, shared, to, origins, number, step, thread)

    def _chunk(
        self, x: Buffer, shared: Buffer, to: Expr, origins: RowOrigins, number: int, step: Expr, thread: Expr
    ) -> None:
        per_chunk, size = CHUNK // self.element_bytes, self.element_bytes
        first = step * (self.tiling.block_k // size) + self.share.column(thread) * per_chunk
        if self.width == 1:
            self._bytes(x, shared, to, origins, number, first)
            return
        for offset in range(0, CHUNK, self.width):
            index, valid = self._element(origins, number, first + offset // size)
            source = pointer(x, T.Select(valid, index, 0))
            act(f"bw_copy_async_{self.width}", pointer(shared, to + offset), source, T.cast(valid, "int32"))

    def _bytes(
        self, x: Buffer, shared: Buffer, to: Expr, origins: RowOrigins, number: int, first: Expr
    ) -> None:
        """Emit a piece made of single bytes: nothing longer is contiguous and aligned."""
        with T.serial(CHUNK // WORD) as word:
            total: Expr = T.int32(0)
            for byte in range(WORD):
                index, valid = self._element(origins, number, first + word * WORD + byte)
                taken = T.if_then_else(valid, T.cast(load(x, [index]), "int32"), T.int32(0))
                total = total + T.shift_left(T.bitwise_and(taken, T.int32(255)), T.int32(8 * byte))
            act("bw_store_word", pointer(shared, to + word * WORD), total)

    def _element(self, origins: RowOrigins, number: int, k: Expr) -> tuple[Expr, Expr]:
        """Return (element index, is inside the image and the reduction) of one element of a row."""
        g, base = self.geometry, load(origins.base, [number])
        if origins.top is None or origins.left is None:
            return base + k, T.And(base > OUTSIDE, k < self.depth)
        tap, channel = k // g.group_channels, k % g.group_channels
        down, right = tap // g.kernel[1] * g.dilations[0], tap % g.kernel[1] * g.dilations[1]
        y, x = load(origins.top, [number]) + down, load(origins.left, [number]) + right
        inside = T.And(T.And(y >= 0, y < g.height), T.And(x >= 0, x < g.width))
        index = base + (down * g.width + right) * g.channels + channel
        return index, T.And(inside, k < self.depth)
