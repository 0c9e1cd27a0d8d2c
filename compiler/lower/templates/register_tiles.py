"""Register tiles: pixels of one output row times a block of weight vectors, and the loops over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.packing import WeightLayout
from bitwright.compiler.lower.templates.scaffold import Expr, loop, share
from bitwright.compiler.lower.templates.staging import Staging


@dataclass(frozen=True)
class Tile:
    """Where one register tile lies: weight block, output row and column, number of pixels."""

    block: Expr
    row: Expr
    column: Expr
    pixels: int


def first_activation(
    geometry: DotGeometry, staging: Staging, layout: WeightLayout, block: Expr, row: Expr, column: Expr
) -> Expr:
    """Return where the activations of a pixel and a weight block begin in the staged image."""
    image = row // geometry.out_height * staging.height + row % geometry.out_height * geometry.strides[0]
    group = block // layout.blocks(geometry)
    pixel = image * staging.width + column * geometry.strides[1]
    return pixel * geometry.channels + group * geometry.group_channels


def over_tiles(
    geometry: DotGeometry,
    layout: WeightLayout,
    pixels: int,
    chunks: int,
    emit: Callable[[Tile], None],
    *,
    parallel: bool,
) -> None:
    """Emit the loops over all register tiles.

    Args:
        geometry: Loop bounds of the step.
        layout: Of the weight, whose blocks are the outer loop.
        pixels: Output pixels of a tile; what is left at the end of a row is a smaller tile.
        chunks: Pieces the pixel tiles are split into; weight blocks x chunks is the parallel loop.
        emit: Emits one tile.
        parallel: Spread the work over threads.
    """
    full, tail = divmod(geometry.out_width, pixels)
    # How many in a row, pixels of each, column of the first.
    kinds = ((full, pixels, 0), (1 if tail else 0, tail, full * pixels))
    with loop(geometry.group * layout.blocks(geometry) * chunks, parallel=parallel) as piece:
        block, chunk = piece // chunks, piece % chunks
        for per_row, size, column in kinds:
            if not geometry.rows * per_row:
                continue
            with share(geometry.rows * per_row, chunks, chunk) as tile:
                emit(Tile(block, tile // per_row, column + tile % per_row * size, size))


def by_channels(
    geometry: DotGeometry, layout: WeightLayout, block: Expr, emit: Callable[[int], None]
) -> None:
    """Emit something for the output channels of a weight block; each group's last block may have fewer.

    Args:
        geometry: Loop bounds of the step.
        layout: Of the weight.
        block: Which block.
        emit: Emits it, given the number of channels.
    """
    blocks = layout.blocks(geometry)
    last = geometry.group_outputs - (blocks - 1) * layout.block
    if last == layout.block or blocks == 1:
        emit(last)
        return
    with T.If(block % blocks < blocks - 1):
        with T.Then():
            emit(layout.block)
        with T.Else():
            emit(last)
