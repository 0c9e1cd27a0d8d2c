"""fp16 matrix product on tensor cores: the same pipeline with other fragments, float32 sums.

The order in which a tensor core adds its products is the processor's own, so results agree with a reference to
rounding, not to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.assemble import kernel_of
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, Parameter, load
from bitwright.targets.backend import Kernel
from bitwright.targets.nvidia_gpu.mma import Template, packed_weight, padded_channels, require_offsets
from bitwright.targets.nvidia_gpu.mma_device import act, pointer
from bitwright.targets.nvidia_gpu.mma_engine import Engine, f16_engine
from bitwright.targets.nvidia_gpu.mma_epilogue import Tile
from bitwright.targets.nvidia_gpu.mma_tiles import Tiling, extent_of

MMA_F16 = "mma_f16"
HALF_BYTES = 2
K_ALIGN = 2


@dataclass(frozen=True)
class HalfOutput:
    """Writes a block's tile as fp16: the float32 sum plus the bias, rounded once.

    Attributes:
        geometry: Extents of the output.
        engine: Says which sums a thread holds.
        relu: Negative values become 0.
    """

    geometry: DotGeometry
    engine: Engine
    relu: bool

    @property
    def staged_bytes(self) -> int:
        """Nothing is collected in shared memory."""
        return 0

    def write(
        self, sums: Buffer, constants: list[Buffer], shared: Buffer, y: Buffer, tile: Tile, thread: Expr
    ) -> None:
        """Emit the epilogue."""
        g = self.geometry
        for pair in self.engine.pairs(thread):
            row, column = tile.row + pair.row, tile.column + pair.column
            for c in range(2):
                real = load(sums, [pair.number + c]) + load(constants[0], [tile.channel + pair.column + c])
                real = T.max(real, T.float32(0)) if self.relu else real
                with T.If(T.And(row < g.pixels, column + c < g.outputs)), T.Then():
                    act("bw_store_half", pointer(y, row * g.outputs + column + c), real)


def half_gemm_kernel(
    rows: int | tuple[int, ...],
    weight: np.ndarray,
    bias: np.ndarray | None,
    tiling: Tiling,
    *,
    relu: bool = False,
) -> Kernel:
    """Return the kernel of ``x [rows, K] @ weight [K, N] + bias`` in fp16.

    Args:
        rows: M, or the axes that make it up: x is [*rows, K], the result [*rows, N].
        weight: float16 [K, N], K even.
        bias: float32 [N] or None.
        tiling: The cut; ``block_k`` counts bytes.
        relu: Negative results become 0.

    Raises:
        ProfileError: K is odd, or a tensor is too large for 32-bit offsets.
    """
    depth, columns = weight.shape
    if depth % K_ALIGN:
        msg = f"fp16 products need an even reduction, not {depth}"
        raise ProfileError(msg, where="fp16 GEMM", fix="pad the weight and its input by a zero")
    axes = (rows,) if isinstance(rows, int) else rows
    m = prod(axes)
    geometry = DotGeometry((*axes, depth), (*axes, columns), 1, 1, m, depth, 1, m, columns)
    require_offsets(geometry, "fp16 GEMM")
    engine = f16_engine(tiling)
    addend = np.zeros(columns, np.float32) if bias is None else bias.astype(np.float32)
    packed = packed_weight(weight.astype(np.float16), geometry, tiling).view(np.int8)
    constants = {"weight": packed, "bias": padded_channels(addend, geometry, tiling)}
    output = HalfOutput(geometry, engine, relu)
    template = Template(geometry, extent_of(geometry, HALF_BYTES), engine, output, HALF_BYTES)
    return kernel_of(
        f"{MMA_F16}|{geometry}|{relu}|{tiling}",
        MMA_F16,
        Parameter("x", geometry.input_shape, "float16"),
        constants,
        Parameter("y", geometry.output_shape, "float16"),
        template.body,
    )
