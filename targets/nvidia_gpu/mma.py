"""Matrix products and convolutions on a thread-block hierarchy: an implicit GEMM with a pipeline of copies.

A block computes a tile of output pixels x channels. Tiles of the reduction travel from global to shared memory by
asynchronous copies, several of them in flight, while the tile that has arrived is multiplied. The channels-last
gather makes a convolution the same product with other addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.assemble import kernel_of
from bitwright.compiler.lower.templates.epilogue import channel_constants, epilogue_of
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, Parameter
from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel
from bitwright.targets.nvidia_gpu.mma_device import act, shared_bytes, thread_block
from bitwright.targets.nvidia_gpu.mma_engine import Engine
from bitwright.targets.nvidia_gpu.mma_epilogue import Output, Tile
from bitwright.targets.nvidia_gpu.mma_stage import ActivationStage, WeightStage
from bitwright.targets.nvidia_gpu.mma_tiles import Extent, Tiling, extent_of, raster

LARGEST_BUFFER = 2**31 - 1


def tiled_kernel(
    step: Dot, program: Program, geometry: DotGeometry, engine: Engine, intrinsic: str
) -> Kernel:
    """Return the kernel of a dot-product step.

    Args:
        step: Gemm or convolution of any shape and grouping.
        program: For shapes and scales.
        geometry: ``geometry_of(step, program)``.
        engine: How a block multiplies; brings the tiling.
        intrinsic: Compute row it is built on.

    Raises:
        ProfileError: The activations are not symmetric int8, or a tensor is too large for 32-bit offsets.
    """
    require_symmetric(step, program)
    require_offsets(geometry, step.name)
    tiling, extent, epilogue = engine.tiling, extent_of(geometry), epilogue_of(step, program)
    arrays = channel_constants(step, program, 0)
    constants = {
        "weight": packed_weight(step.weight, geometry, tiling),
        **{name: padded_channels(array, geometry, tiling) for name, array in arrays.items()},
    }
    template = Template(geometry, extent, engine, Output(geometry, epilogue, engine))
    return kernel_of(
        f"{intrinsic}|{geometry}|{epilogue}|{tiling}",
        intrinsic,
        Parameter("x", geometry.input_shape, "int8"),
        constants,
        Parameter("y", geometry.output_shape, epilogue.dtype),
        template.body,
    )


def require_symmetric(step: Dot, program: Program) -> None:
    """Raise ProfileError unless the activations are int8 with zero point 0: padding is written as zeros."""
    quant = program.tensor(step.inputs[0]).quant
    if quant is None or quant.dtype != "int8" or quant.zero_point != 0:
        what = f"kernels of this family multiply symmetric int8 activations, not {quant}"
        raise ProfileError(what, where=step.name, fix="give the profile's activations a symmetric s8 space")


def require_offsets(geometry: DotGeometry, where: str) -> None:
    """Raise ProfileError if a tensor has more elements than 32-bit offsets reach."""
    largest = max(prod(geometry.input_shape), prod(geometry.output_shape))
    if largest > LARGEST_BUFFER:
        what = f"a tensor of {largest} elements is too large for 32-bit offsets"
        raise ProfileError(what, where=where, fix="compile for a smaller batch")


def packed_weight(weight: np.ndarray, geometry: DotGeometry, tiling: Tiling) -> np.ndarray:
    """Return a Gemm weight [K, N] or a convolution weight [O, I/group, KH, KW] as [group, padded N, padded K].

    The reduction runs over (kernel row, kernel column, channel); what is missing to whole tiles is zeros.
    """
    g = geometry
    rows = weight.T if weight.ndim == 2 else weight.transpose(0, 2, 3, 1).reshape(weight.shape[0], -1)
    elements = tiling.block_k // weight.itemsize
    columns, depth = _rounded(g.group_outputs, tiling.block_n), _rounded(rows.shape[1], elements)
    packed = np.zeros((g.group, columns, depth), weight.dtype)
    packed[:, : g.group_outputs, : rows.shape[1]] = rows.reshape(g.group, g.group_outputs, -1)
    return packed


def padded_channels(array: np.ndarray, geometry: DotGeometry, tiling: Tiling) -> np.ndarray:
    """Return a per-channel array [O] as [group * padded N]."""
    g = geometry
    padded = np.zeros((g.group, _rounded(g.group_outputs, tiling.block_n)), array.dtype)
    padded[:, : g.group_outputs] = np.broadcast_to(array, (g.outputs,)).reshape(g.group, -1)
    return padded.reshape(-1)


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


class Epilogues(Protocol):
    """What is done with a block's sums."""

    @property
    def staged_bytes(self) -> int:
        """Bytes of an output element that is collected in shared memory first; 0 if it is stored from registers."""
        ...

    def write(
        self, sums: Buffer, constants: list[Buffer], shared: Buffer, y: Buffer, tile: Tile, thread: Expr
    ) -> None:
        """Emit the epilogue; the block's shared memory must be free, and all threads come here."""
        ...


@dataclass(frozen=True)
class Template:
    """The loops of a product.

    Attributes:
        geometry: Where rows of activations lie.
        extent: The product's size.
        engine: How a block multiplies.
        output: What is done with its sums.
        element_bytes: Of activations and weights.
    """

    geometry: DotGeometry
    extent: Extent
    engine: Engine
    output: Epilogues
    element_bytes: int = 1

    def body(self, buffers: list[Buffer]) -> None:
        """Emit the kernel, given flat views of the activations, the weight, the channels' constants and the output."""
        x, weight, *constants, y = buffers
        tiling = self.engine.tiling
        along_m, along_n, steps = self.extent.tiles(tiling)
        blocks = (along_m * along_n, self.extent.groups)
        with thread_block(blocks, tiling.threads) as ((number, group), thread):
            shared = shared_bytes(tiling.shared_bytes(self.output.staged_bytes))
            tile = self._tile(number, group, along_m, along_n)
            sums = self.engine.start()
            loads = _Loads(self, x, weight, shared, tile, thread)
            self._reduce(loads, steps, sums)
            act("bw_wait_0")
            act("bw_barrier")
            self.output.write(sums, constants, shared, y, tile, thread)

    def _tile(self, number: Expr, group: Expr, along_m: int, along_n: int) -> Tile:
        """Return the block's tile: a few row tiles go through all column tiles before the next row tiles."""
        rows, tiling = raster(along_m), self.engine.tiling
        band, inside = number // (rows * along_n), number % (rows * along_n)
        row = (band * rows + inside % rows) * tiling.block_m
        column = inside // rows * tiling.block_n
        return Tile(row, group * (along_n * tiling.block_n) + column, column, group)

    def _reduce(self, loads: _Loads, steps: int, sums: Buffer) -> None:
        stages = self.engine.tiling.stages
        for stage in range(stages - 1):
            if stage < steps:
                loads.emit(stage, stage)
            act("bw_commit")
        with T.serial(steps) as step:
            # The stage that the step before has read is free behind the barrier: it takes the next loads.
            act(f"bw_wait_{stages - 2}")
            self.engine.publish()
            act("bw_barrier")
            at = step % stages * self.engine.tiling.stage_bytes
            if self.engine.is_asynchronous:
                self.engine.multiply(loads.shared, at, loads.thread, sums)
                loads.ahead(step, steps, stages)
                self.engine.wait(sums)
            else:
                loads.ahead(step, steps, stages)
                self.engine.multiply(loads.shared, at, loads.thread, sums)


class _Loads:
    """The copies of a block: the same for every step of the reduction, but for the step's number."""

    def __init__(
        self, template: Template, x: Buffer, weight: Buffer, shared: Buffer, tile: Tile, thread: Expr
    ) -> None:
        self.x, self.weight, self.shared, self.tile, self.thread = x, weight, shared, tile, thread
        self.tiling = template.engine.tiling
        steps = template.extent.tiles(self.tiling)[2]
        self.rows = ActivationStage(template.geometry, self.tiling, template.element_bytes)
        self.columns = WeightStage(self.tiling, steps * self.tiling.block_k)
        self.origins = self.rows.origins(tile.row, tile.group, thread)

    def emit(self, step: Expr, stage: Expr) -> None:
        """Emit the copies of one step of the reduction into a stage."""
        at = stage * self.tiling.stage_bytes
        self.rows.load(self.x, self.shared, at, self.origins, step, self.thread)
        weights = at + self.tiling.block_m * self.tiling.block_k
        self.columns.load(self.weight, self.shared, weights, self.tile.channel, step, self.thread)

    def ahead(self, step: Expr, steps: int, stages: int) -> None:
        """Emit the copies that a step starts: those of the last of the steps in flight behind it."""
        later = step + (stages - 1)
        with T.If(later < steps), T.Then():
            self.emit(later, later % stages)
        act("bw_commit")
