"""Products of float activations with weights of 2, 4 or 8 bits, taken apart in registers.

A block computes 32 columns, one a lane, of a few rows. It rounds its rows of activations in the groups of the weight
into shared memory; then its warps multiply different groups at the same time, and one warp for each row adds the
groups up in rising order, as ``WeightOnlyDot`` demands.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import kernel_of
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, Parameter, load, store
from bitwright.compiler.lower.templates.weight_only_geometry import FOLD, WeightOnlyGeometry, packed_codes
from bitwright.compiler.program.ops import SMALLEST_ACTIVATION, Program, WeightOnlyDot
from bitwright.targets.backend import Kernel
from bitwright.targets.nvidia_gpu.mma_device import (
    WARP,
    act,
    pointer,
    registers,
    shared_bytes,
    thread_block,
    value,
)
from bitwright.targets.sections.gpu import Gpu

CHUNK, WORD = 16, 4
SIGN = 128
MAX_ROWS = 8


@dataclass(frozen=True)
class WeightOnlyTile:
    """What a tuner may change; the result never depends on it.

    Attributes:
        rows: Rows of a block, at most ``warps``.
        warps: Warps of a block: groups that are multiplied at the same time.
    """

    rows: int
    warps: int


@dataclass(frozen=True)
class Layout:
    """Where things lie in a block's shared memory, in bytes.

    Attributes:
        geometry: Of the step.
        tile: Of a block.
    """

    geometry: WeightOnlyGeometry
    tile: WeightOnlyTile

    @property
    def words(self) -> int:
        """Words of a lane and group that are loaded at once: 4 where a group has them, else 1."""
        return WORD if self.geometry.steps % WORD == 0 else 1

    @property
    def stride(self) -> int:
        """Rounded activations of a row and group, filled with zeros to whole 16-byte pieces."""
        return -(-self.geometry.stride // CHUNK) * CHUNK

    @property
    def scales(self) -> int:
        """Activation scales [rows, groups], float32, behind the activations [rows, groups, stride]."""
        return self.tile.rows * self.geometry.groups * self.stride

    @property
    def sums(self) -> int:
        """Sums of rounded activations [rows, groups], int32."""
        return self.scales + 4 * self.tile.rows * self.geometry.groups

    @property
    def exchange(self) -> int:
        """Two turns of pairs (product, its scale) [2, warps, rows, 32], float32 each."""
        return self.sums + 4 * self.tile.rows * self.geometry.groups

    @property
    def turn_bytes(self) -> int:
        """Bytes of one turn's pairs."""
        return 8 * self.tile.warps * self.tile.rows * WARP

    @property
    def total(self) -> int:
        """All of it."""
        return -(-self.exchange // 8) * 8 + 2 * self.turn_bytes

    def pair(self, turn: Expr, warp: Expr, row: Expr, lane: Expr) -> Expr:
        """Return where a pair lies."""
        index = ((turn % 2 * self.tile.warps + warp) * self.tile.rows + row) * WARP + lane
        return -(-self.exchange // 8) * 8 + index * 8


def geometry_on_gpu(step: WeightOnlyDot, program: Program) -> WeightOnlyGeometry:
    """Return the loop bounds; codes of 8 bits are stored less 128."""
    depth, columns = step.weight.shape
    zeros = np.unique(step.zero_point)
    zero = int(zeros[0]) - _offset(step.bits) if zeros.size == 1 else None
    shape, out = program.tensor(step.inputs[0]).shape, program.tensor(step.output).shape
    return WeightOnlyGeometry(shape, out, depth, columns, step.bits, step.group, zero, step.bias is not None)


def _offset(bits: int) -> int:
    return SIGN if bits == 8 else 0


def space(geometry: WeightOnlyGeometry, gpu: Gpu) -> Iterator[WeightOnlyTile]:
    """Yield the legal tiles: as many rows as there are, up to 8, since every tile of rows reads all weights."""
    most = min(MAX_ROWS, 1 << (geometry.rows - 1).bit_length())
    rows = (r for r in (8, 4, 2, 1) if r <= most)
    tiles = (WeightOnlyTile(r, warps) for r in rows for warps in (8, 4, 16) if r <= warps)
    yield from (t for t in tiles if Layout(geometry, t).total <= gpu.shared_bytes_per_block)


def weight_only_kernel(step: WeightOnlyDot, program: Program, tile: WeightOnlyTile, intrinsic: str) -> Kernel:
    """Return the kernel of a step.

    Args:
        step: Any number of rows, any group length.
        program: For shapes.
        tile: One of ``space``.
        intrinsic: Compute row it is built on.
    """
    geometry = geometry_on_gpu(step, program)
    layout = Layout(geometry, tile)
    constants = _constants(step, layout)
    return kernel_of(
        f"weight_only|{intrinsic}|{geometry}|{tile}",
        intrinsic,
        Parameter("x", geometry.input_shape, "float32"),
        constants,
        Parameter("y", geometry.output_shape, "float32"),
        _Template(layout).body,
    )


def _constants(step: WeightOnlyDot, layout: Layout) -> dict[str, np.ndarray]:
    g, words = layout.geometry, layout.words
    codes = packed_codes(step.weight, g, WARP) ^ np.uint8(_offset(step.bits))
    # The words of a lane that are loaded at once lie side by side.
    split = codes.reshape(codes.shape[0], g.groups, g.steps // words, words, WARP, FOLD).transpose(
        0, 1, 2, 4, 3, 5
    )
    arrays = {"weight": np.ascontiguousarray(split).view(np.int8), "scale": _by_columns(step.scale)}
    if g.zero is None:
        arrays["zero_point"] = _by_columns(
            (step.zero_point.astype(np.int16) - _offset(step.bits)).astype(np.int16)
        )
    if step.bias is not None:
        arrays["bias"] = _by_columns(step.bias.astype(np.float32)[None])
    return arrays


def _by_columns(array: np.ndarray) -> np.ndarray:
    """Return [groups, N] as [column vectors, groups, 32], filled with zeros."""
    groups, columns = array.shape
    vectors = -(-columns // WARP)
    padded = np.zeros((groups, vectors * WARP), array.dtype)
    padded[:, :columns] = array
    return np.ascontiguousarray(padded.reshape(groups, vectors, WARP).transpose(1, 0, 2))


@dataclass(frozen=True)
class _Views:
    x: Buffer
    weight: Buffer
    scale: Buffer
    zero: Buffer | None
    shared: Buffer
    vector: Expr
    row: Expr
    warp: Expr
    lane: Expr


@dataclass(frozen=True)
class _Template:
    layout: Layout

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, scale, *rest, y = buffers
        g, tile = self.layout.geometry, self.layout.tile
        bias = rest.pop() if g.bias else None
        grid = (g.column_vectors(WARP), -(-g.rows // tile.rows))
        with thread_block(grid, WARP * tile.warps) as ((vector, block), thread):
            shared = shared_bytes(self.layout.total)
            zero = rest[0] if rest else None
            row, warp, lane = block * tile.rows, thread // WARP, thread % WARP
            views = _Views(x, weight, scale, zero, shared, vector, row, warp, lane)
            self._round(views)
            act("bw_barrier")
            total = registers(1, "float32")
            store(total, T.float32(0) if bias is None else load(bias, [vector * WARP + lane]), [0])
            turns = -(-g.groups // tile.warps)
            with T.serial(turns) as turn:
                self._multiply(views, turn)
                act("bw_barrier")
                self._add_up(views, turn, total)
            column = vector * WARP + lane
            inside = T.And(T.And(warp < tile.rows, row + warp < g.rows), column < g.columns)
            with T.If(inside), T.Then():
                store(y, load(total, [0]), [(row + warp) * g.columns + column])

    def _round(self, v: _Views) -> None:
        """Emit the rounding of the block's rows: a warp takes one group of one row at a time."""
        g, s, tile = self.layout.geometry, self.layout, self.layout.tile
        work = tile.rows * g.groups
        with T.serial(-(-work // tile.warps)) as turn:
            item = turn * tile.warps + v.warp
            with T.If(item < work), T.Then():
                row, group = item // g.groups, item % g.groups
                top = registers(1, "float32")
                store(top, T.float32(0), [0])
                with T.serial(-(-s.stride // WARP)) as piece:
                    magnitude = value("bw_magnitude", self._activation(v, row, group, piece), dtype="float32")
                    store(top, value("bw_largest", load(top, [0]), magnitude, dtype="float32"), [0])
                for mask in (16, 8, 4, 2, 1):
                    other = value("bw_shuffle_xor", load(top, [0]), T.int32(mask), dtype="float32")
                    store(top, value("bw_largest", load(top, [0]), other, dtype="float32"), [0])
                self._store_rounded(v, item, row, group, load(top, [0]))

    def _store_rounded(self, v: _Views, item: Expr, row: Expr, group: Expr, top: Expr) -> None:
        s = self.layout
        factor, total = registers(1, "float32"), registers(1, "int32")
        least = T.float32(SMALLEST_ACTIVATION)
        store(factor, value("bw_group_factor", top, least, dtype="float32"), [0])
        store(total, T.int32(0), [0])
        code = registers(1, "int32")
        with T.serial(-(-s.stride // WARP)) as piece:
            real = self._activation(v, row, group, piece)
            scaled = value("bw_multiply", real, load(factor, [0]), dtype="float32")
            store(code, value("bw_round", scaled, dtype="int32"), [0])
            store(total, load(total, [0]) + load(code, [0]), [0])
            at = piece * WARP + v.lane
            with T.If(at < s.stride), T.Then():
                store(v.shared, T.cast(load(code, [0]), "int8"), [item * s.stride + at])
        for mask in (16, 8, 4, 2, 1):
            other = value("bw_shuffle_xor_int", load(total, [0]), T.int32(mask), dtype="int32")
            store(total, load(total, [0]) + other, [0])
        with T.If(v.lane == 0), T.Then():
            worth = value("bw_group_scale", top, dtype="float32")
            act("bw_store_float", pointer(v.shared, s.scales + 4 * item), worth)
            act("bw_store_word", pointer(v.shared, s.sums + 4 * item), load(total, [0]))

    def _activation(self, v: _Views, row: Expr, group: Expr, piece: Expr) -> Expr:
        """Return a lane's activation in a piece of 32 of a group; 0 where there is none."""
        g = self.layout.geometry
        at = piece * WARP + v.lane
        k, m = group * g.group + at, v.row + row
        inside = T.And(T.And(at < g.group, k < g.depth), m < g.rows)
        return T.if_then_else(inside, load(v.x, [m * g.depth + k]), T.float32(0))

    def _multiply(self, v: _Views, turn: Expr) -> None:
        """Emit the products of one group for each warp, and leave them with their scales in shared memory."""
        g, s, tile = self.layout.geometry, self.layout, self.layout.tile
        group = turn * tile.warps + v.warp
        with T.If(group < g.groups), T.Then():
            sums = registers(tile.rows, "int32")
            for r in range(tile.rows):
                store(sums, T.int32(0), [r])
            words = registers(s.words, "int32")
            with T.serial(g.steps // s.words) as step:
                at = (
                    (((v.vector * g.groups + group) * (g.steps // s.words) + step) * WARP + v.lane)
                    * s.words
                    * WORD
                )
                act(f"bw_move_{s.words * WORD}", pointer(words, 0), pointer(v.weight, at))
                for word in range(s.words):
                    self._word(v, load(words, [word]), group, step * s.words + word, sums)
            at = (v.vector * g.groups + group) * WARP + v.lane
            for r in range(tile.rows):
                self._leave(v, turn, r, group, at, load(sums, [r]))

    def _word(self, v: _Views, word: Expr, group: Expr, step: Expr, sums: Buffer) -> None:
        """Emit the products of one word of codes: a dot product for each place of a code in its byte."""
        g, s = self.layout.geometry, self.layout
        mask = T.int32(int.from_bytes(bytes([(1 << g.bits) - 1] * 4), "little", signed=True))
        codes = registers(1, "int32")
        for plane in range(g.planes):
            shifted = T.shift_right(word, T.int32(plane * g.bits)) if plane else word
            store(codes, T.bitwise_and(shifted, mask), [0])
            for r in range(s.tile.rows):
                at = (r * g.groups + group) * s.stride + (step * g.planes + plane) * FOLD
                activations = value("bw_load_word", pointer(v.shared, at), dtype="int32")
                total = value("bw_dp4a", load(codes, [0]), activations, load(sums, [r]), dtype="int32")
                store(sums, total, [r])

    def _leave(self, v: _Views, turn: Expr, r: int, group: Expr, at: Expr, dot: Expr) -> None:
        g, s = self.layout.geometry, self.layout
        item = r * g.groups + group
        zero = T.int32(g.zero) if v.zero is None else T.cast(load(v.zero, [at]), "int32")
        taken = value("bw_load_word", pointer(v.shared, s.sums + 4 * item), dtype="int32")
        worth = value("bw_load_float", pointer(v.shared, s.scales + 4 * item), dtype="float32")
        scale = value("bw_multiply", worth, load(v.scale, [at]), dtype="float32")
        real = T.cast(dot - zero * taken, "float32")
        act("bw_store_floats_2", pointer(v.shared, s.pair(turn, v.warp, r, v.lane)), real, scale)

    def _add_up(self, v: _Views, turn: Expr, total: Buffer) -> None:
        """Emit the sum of a turn's groups, in their order, by the warp that owns the row."""
        g, s, tile = self.layout.geometry, self.layout, self.layout.tile
        with T.If(v.warp < tile.rows), T.Then():
            for w in range(tile.warps):
                at = s.pair(turn, w, v.warp, v.lane)
                real = value("bw_load_float", pointer(v.shared, at), dtype="float32")
                scale = value("bw_load_float", pointer(v.shared, at + 4), dtype="float32")
                with T.If(turn * tile.warps + w < g.groups), T.Then():
                    store(total, value("bw_fma", real, scale, load(total, [0]), dtype="float32"), [0])
