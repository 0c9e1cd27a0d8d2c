"""Gemm and convolution as products of patches: the bytes under the kernel, gathered for a few output pixels at a time.

Memory is what microcontrollers lack. The gathered patches are a few hundred bytes, where a padded copy of the image
would double what the layer needs. A Gemm, and a 1x1 convolution, read their activations where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.assemble import assemble_kernel
from bitwright.compiler.lower.templates.epilogue import Epilogue, channel_constants, epilogue_of
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    allocate,
    for_span,
    load,
    loop,
    splat,
    store,
)
from bitwright.compiler.lower.templates.staging import Staging
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel
from bitwright.targets.cortex_m.accumulators import PartialSums, Scalars
from bitwright.targets.cortex_m.epilogue import emit_epilogue, whole_vectors
from bitwright.targets.cortex_m.instruction import PatchInstruction


@dataclass(frozen=True)
class PatchGemmParams:
    """What a tuner may change; the result never depends on it.

    Attributes:
        pixels: Output pixels of the register tile.
        channels: Output channels of the register tile.
    """

    pixels: int
    channels: int


def space(geometry: DotGeometry, instruction: PatchInstruction) -> Iterator[PatchGemmParams]:
    """Yield the legal tiles, fewest instructions for a product first.

    A chunk of a tile of P pixels and V channels takes P + V loads and P * V multiplications. The epilogue handles
    ``lanes`` channels at once, so a tile of fewer wastes its lanes.
    """
    tiles = [
        PatchGemmParams(pixels, channels)
        for pixels in (1, 2, 4)
        for channels in (1, 2, 4)
        if pixels * channels <= instruction.accumulators and pixels <= geometry.pixels
    ]
    depth = prod(geometry.kernel) * geometry.group_channels / instruction.chunk

    def cost(tile: PatchGemmParams) -> float:
        products = tile.pixels * tile.channels
        multiply = depth * (tile.pixels + tile.channels + products) / products
        vector = instruction.lanes if tile.channels % instruction.lanes == 0 else 1
        return multiply + 10 / vector

    yield from sorted(tiles, key=lambda t: (cost(t), t.pixels, t.channels))


def patch_gemm_kernel(
    step: Dot,
    program: Program,
    geometry: DotGeometry,
    instruction: PatchInstruction,
    params: PatchGemmParams,
) -> Kernel:
    """Return the kernel of a dot-product step.

    Args:
        step: Gemm or convolution of any shape, grouping and padding; activations of type int8.
        program: For shapes, scales and zero points.
        geometry: ``geometry_of(step, program)``.
        instruction: How to multiply.
        params: Register tile.
    """
    source = program.tensor(step.inputs[0])
    assert source.quant is not None
    depth = prod(geometry.kernel) * geometry.group_channels
    gathered = _is_gathered(geometry, depth, instruction.chunk)
    # What the kernel record calls staging: here only whether patches are gathered, and what padding holds.
    staging = Staging(source.dtype, "int8", 1, depth, 0, gathered, source.quant.zero_point)
    epilogue = epilogue_of(step, program)
    arrays = channel_constants(step, program, 0)
    constants = {
        "weight": pack_patches(step.weight, geometry, instruction.chunk, params.channels),
        **{name: _padded(array, geometry, params.channels) for name, array in arrays.items()},
    }
    template = _Template(geometry, staging, epilogue, instruction, params, depth)
    details = (params, instruction.variant)
    return assemble_kernel(instruction.name, geometry, staging, epilogue, details, constants, template.body)


def pack_patches(weight: np.ndarray, geometry: DotGeometry, chunk: int, channels: int) -> np.ndarray:
    """Pack a Gemm weight [K, N] or a convolution weight [O, I/group, KH, KW].

    Returns:
        Flat int8 array in the order [group, blocks of ``channels``, chunks, channels, chunk]; missing channels and
        reduction elements are zeros.
    """
    group, outputs = geometry.group, geometry.group_outputs
    rows = weight.T if weight.ndim == 2 else weight.transpose(0, 2, 3, 1)
    rows = rows.reshape(group, outputs, -1)
    blocks, chunks = -(-outputs // channels), -(-rows.shape[2] // chunk)
    padded = np.zeros((group, blocks * channels, chunks * chunk), np.int8)
    padded[:, :outputs, : rows.shape[2]] = rows
    split = padded.reshape(group, blocks, channels, chunks, chunk).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(split).reshape(-1)


def _padded(array: np.ndarray, geometry: DotGeometry, channels: int) -> np.ndarray:
    """Return a per-channel array with whole blocks in every group: [group * blocks * channels]."""
    width = -(-geometry.group_outputs // channels) * channels
    padded = np.zeros((geometry.group, width), array.dtype)
    grouped = np.broadcast_to(array, (geometry.outputs,)).reshape(geometry.group, -1)
    padded[:, : geometry.group_outputs] = grouped
    return padded.reshape(-1)


def _is_gathered(geometry: DotGeometry, depth: int, chunk: int) -> bool:
    """Tell whether patches must be copied: they are no contiguous run, or a chunk would reach behind the end."""
    contiguous = geometry.kernel == (1, 1) and geometry.group == 1 and not any(geometry.pads)
    return not contiguous or depth % chunk != 0


@dataclass(frozen=True)
class _Buffers:
    x: Buffer
    weight: Buffer
    bias: Buffer
    scales: list[Buffer]
    output: Buffer
    patches: Buffer | None


@dataclass(frozen=True)
class _Tile:
    """Group, first output pixel and number of pixels."""

    group: Expr
    pixel: Expr
    pixels: int


@dataclass(frozen=True)
class _Template:
    geometry: DotGeometry
    staging: Staging
    epilogue: Epilogue
    instruction: PatchInstruction
    params: PatchGemmParams
    depth: int

    @property
    def chunks(self) -> int:
        return -(-self.depth // self.instruction.chunk)

    @property
    def blocks(self) -> int:
        return -(-self.geometry.group_outputs // self.params.channels)

    def body(self, buffers: list[Buffer]) -> None:
        x, weight, bias, *scales, y = buffers
        patches = None
        if self.staging.copied:
            patches = allocate((self.params.pixels * self.chunks * self.instruction.chunk,), "int8")
        views = _Buffers(x, weight, bias, scales, y, patches)
        with loop(self.geometry.group) as group:
            full, tail = divmod(self.geometry.pixels, self.params.pixels)
            if full:
                with loop(full) as tile:
                    self._tile(views, _Tile(group, tile * self.params.pixels, self.params.pixels))
            if tail:
                self._tile(views, _Tile(group, full * self.params.pixels, tail))

    def _tile(self, views: _Buffers, tile: _Tile) -> None:
        if views.patches is not None:
            with loop(tile.pixels) as slot:
                self._gather(views, tile.group, tile.pixel + slot, slot)
        full, tail = divmod(self.geometry.group_outputs, self.params.channels)
        if full:
            with loop(full) as block:
                self._block(views, tile, block, self.params.channels)
        if tail:
            self._block(views, tile, full, tail)

    def _position(self, pixel: Expr) -> tuple[Expr, Expr, Expr]:
        """Return (image, first row, first column) under the kernel at an output pixel; they may lie in the padding."""
        g = self.geometry
        row, column = pixel // g.out_width, pixel % g.out_width
        top, left = g.pads[:2]
        return row // g.out_height, row % g.out_height * g.strides[0] - top, column * g.strides[1] - left

    def _gather(self, views: _Buffers, group: Expr, pixel: Expr, slot: Expr) -> None:
        """Copy the bytes under the kernel into a slot of the patches; padding holds the zero point."""
        g = self.geometry
        image, top, left = self._position(pixel)
        row_bytes = g.kernel[1] * g.group_channels
        with loop(g.kernel[0]) as kh:
            ih = top + kh * g.dilations[0]
            source = (image * g.height + ih) * g.width
            target = slot * self.chunks * self.instruction.chunk + kh * row_bytes
            whole = self._whole_row(left)
            if whole is None:
                self._gather_row(views, group, (ih, left), source, target)
                return
            with T.If(tirx.all(ih >= 0, ih < g.height, *whole)):
                with T.Then():
                    self._copy(views, target, (source + left) * g.channels, row_bytes)
                with T.Else():
                    self._gather_row(views, group, (ih, left), source, target)

    def _whole_row(self, left: Expr) -> tuple[Expr, ...] | None:
        """Return when a kernel row is one run of the image, or None if it never is."""
        g = self.geometry
        if g.group > 1 or g.dilations[1] > 1:
            return None
        return left >= 0, left + g.kernel[1] <= g.width

    def _gather_row(
        self, views: _Buffers, group: Expr, origin: tuple[Expr, Expr], source: Expr, target: Expr
    ) -> None:
        g = self.geometry
        ih, left = origin
        with loop(g.kernel[1]) as kw:
            iw = left + kw * g.dilations[1]
            at = target + kw * g.group_channels
            with T.If(tirx.all(ih >= 0, ih < g.height, iw >= 0, iw < g.width)):
                with T.Then():
                    first = (source + iw) * g.channels + group * g.group_channels
                    self._copy(views, at, first, g.group_channels)
                with T.Else():
                    self._fill(views, at, g.group_channels)

    def _copy(self, views: _Buffers, target: Expr, source: Expr, length: int) -> None:
        patches, width = views.patches, self.instruction.chunk
        for_span(
            length,
            lambda i, n: store(patches, load(views.x, [source + i], n), [target + i], n),
            width,
        )

    def _fill(self, views: _Buffers, target: Expr, length: int) -> None:
        patches, fill = views.patches, T.int8(self.staging.fill)
        for_span(length, lambda i, n: store(patches, splat(fill, n), [target + i], n), self.instruction.chunk)

    def _block(self, views: _Buffers, tile: _Tile, block: Expr, channels: int) -> None:
        """Emit the register tile of one block of channels."""
        constant = (tile.group * self.blocks + block) * self.params.channels
        totals = [self._accumulators(channels) for _ in range(tile.pixels)]
        for row in totals:
            for channel in range(channels):
                row.clear(channel)
        chunk = self.instruction.chunk
        starts = [self._start(tile, pixel) for pixel in range(tile.pixels)]
        with loop(self.chunks) as k:
            weight_at = ((tile.group * self.blocks + block) * self.chunks + k) * self.params.channels
            self._multiply(views, totals, [s + k * chunk for s in starts], weight_at, channels)
        first = tile.group * self.geometry.group_outputs + block * self.params.channels
        for pixel in range(tile.pixels):
            at = (tile.pixel + pixel) * self.geometry.outputs + first
            for offset, lanes in whole_vectors(channels, self.instruction.lanes):
                total = totals[pixel].load(offset, lanes) + load(views.bias, [constant + offset], lanes)
                value = emit_epilogue(
                    self.epilogue, total, views.scales, constant + offset, lanes, self.instruction.convert
                )
                store(views.output, value, [at + offset], lanes)

    def _accumulators(self, count: int) -> Scalars | PartialSums:
        return PartialSums(count) if self.instruction.partial_sums else Scalars(count)

    def _start(self, tile: _Tile, pixel: int) -> Expr:
        """Return where a pixel's patch begins."""
        if self.staging.copied:
            return pixel * self.chunks * self.instruction.chunk
        g = self.geometry
        image, row, column = self._position(tile.pixel + pixel)
        if g.strides == (1, 1):
            return (tile.pixel + pixel) * g.channels
        return ((image * g.height + row) * g.width + column) * g.channels

    def _multiply(
        self,
        views: _Buffers,
        totals: Sequence[Scalars | PartialSums],
        starts: list[Expr],
        weight_at: Expr,
        channels: int,
    ) -> None:
        chunk, unpack = self.instruction.chunk, self.instruction.unpack
        source = views.x if views.patches is None else views.patches
        activations = [unpack(load(source, [start], chunk)) for start in starts]
        for channel in range(channels):
            weights = unpack(load(views.weight, [(weight_at + channel) * chunk], chunk))
            for row, values in zip(totals, activations, strict=True):
                row.store(channel, self.instruction.add(row.partial(channel), values, weights))
