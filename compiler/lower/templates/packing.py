"""Constants in the order the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitwright.compiler.lower.templates.geometry import DotGeometry


@dataclass(frozen=True)
class WeightLayout:
    """Blocked order of a packed weight: [blocks, TH, TW, chunks, vectors, chunk / fold, lanes, fold] of int8.

    Missing reduction elements and output channels are zeros.

    Attributes:
        chunk: Reduction elements handled at once.
        fold: Neighbouring reduction elements that lie side by side in one lane.
        vectors: Weight vectors of one block.
        lanes: Output channels of one vector.
    """

    chunk: int
    fold: int
    vectors: int
    lanes: int

    @property
    def block(self) -> int:
        """Output channels of one block."""
        return self.vectors * self.lanes

    @property
    def step_size(self) -> int:
        """Bytes of one chunk of one block."""
        return self.chunk * self.block

    def blocks(self, geometry: DotGeometry) -> int:
        """Blocks of one group."""
        return -(-geometry.group_outputs // self.block)

    def chunks(self, geometry: DotGeometry) -> int:
        """Chunks of one contiguous run."""
        return -(-geometry.run // self.chunk)

    def overrun(self, geometry: DotGeometry) -> int:
        """Activations read behind the end of a run; the weights there are zero."""
        return self.chunks(geometry) * self.chunk - geometry.run


def pack_weight(weight: np.ndarray, geometry: DotGeometry, layout: WeightLayout) -> np.ndarray:
    """Pack a Gemm weight [K, N] or a convolution weight [O, I/group, KH, KW].

    Returns:
        Flat int8 array in the order of ``WeightLayout``.
    """
    g, (th, tw), n = geometry.group, geometry.taps, geometry.group_outputs
    if weight.ndim == 4:
        weight = weight.reshape(g, n, *weight.shape[1:]).transpose(0, 3, 4, 2, 1)
    runs = weight.reshape(g, th, tw, geometry.run, n)
    nb, nk = layout.blocks(geometry), layout.chunks(geometry)
    padded = np.zeros((g, th, tw, nk * layout.chunk, nb * layout.block), np.int8)
    padded[:, :, :, : geometry.run, :n] = runs
    steps = layout.chunk // layout.fold
    split = padded.reshape(g, th, tw, nk, steps, layout.fold, nb, layout.vectors, layout.lanes)
    return np.ascontiguousarray(split.transpose(0, 6, 1, 2, 3, 7, 4, 8, 5)).reshape(-1)


def pad_channels(array: np.ndarray, geometry: DotGeometry, layout: WeightLayout) -> np.ndarray:
    """Pad a per-channel array [O] so that every block of every group is whole: [group * blocks * block]."""
    grouped = np.broadcast_to(array, (geometry.outputs,)).reshape(geometry.group, geometry.group_outputs)
    width = layout.blocks(geometry) * layout.block
    padded = np.zeros((geometry.group, width), array.dtype)
    padded[:, : geometry.group_outputs] = grouped
    return padded.reshape(-1)
