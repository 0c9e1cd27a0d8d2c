"""The rows that an anchor multiplies with its weight: tokens of a MatMul or Gemm, patches of a Conv."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view

from bitwright.compiler.errors import UsageError
from bitwright.compiler.graph.model import int_attribute, ints_attribute, node_label
from bitwright.compiler.graph.operands import weight_array, weight_of

# Patches of one sample that count. Neighbouring patches overlap and say the same; all 12544 patches of a 112 x 112
# image make the second moment no better and cost twelve times as much.
PATCHES_PER_SAMPLE = 1024


@dataclass(frozen=True)
class RowGeometry:
    """How the rows of a matrix product lie in the data operand; nodes with equal geometry have equal rows.

    Attributes:
        depth: K, the length of a row of one group.
        groups: G.
        transposed: A Gemm that reads its data transposed.
        kernel: Sizes of a convolution's window, () for MatMul and Gemm.
        strides, dilations: One for each axis of the kernel.
        pads: Zeros before and behind each axis, in ONNX's order (all begins, then all ends).
        auto_pad: ``"NOTSET"``, ``"VALID"``, ``"SAME_UPPER"`` or ``"SAME_LOWER"``.
    """

    depth: int
    groups: int = 1
    transposed: bool = False
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"

    def rows(self, values: np.ndarray, patches: int = PATCHES_PER_SAMPLE) -> Iterator[np.ndarray]:
        """Yield blocks of rows, shape (n, G, K), float32 (float64 for float64 data).

        Args:
            values: The data operand of the node.
            patches: At most so many patches of each sample of a convolution, evenly spaced.
        """
        exact = np.float64 if values.dtype == np.float64 else np.float32
        if not self.kernel:
            matrix = values.T if self.transposed else values
            yield np.asarray(matrix, exact).reshape(-1, 1, self.depth)
            return
        for sample in values:
            yield self._patches(np.asarray(sample, exact), patches)

    def _patches(self, sample: np.ndarray, limit: int) -> np.ndarray:
        """Return patches (n, G, K) of one sample (C, *spatial), channels outermost within a patch."""
        padded = np.pad(sample, [(0, 0), *self._padding(sample.shape[1:])])
        extents = tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))
        spatial = tuple(range(1, 1 + len(self.kernel)))
        windows = sliding_window_view(padded, extents, axis=spatial)
        steps = tuple(slice(None, None, s) for s in self.strides)
        dilated = tuple(slice(None, None, d) for d in self.dilations)
        windows = windows[(slice(None), *steps, *dilated)]
        sizes = windows.shape[1 : 1 + len(self.kernel)]
        chosen: tuple[Any, ...] = np.unravel_index(spread(math.prod(sizes), limit, sizes[-1]), sizes)
        picked = windows[(slice(None), *chosen)]  # (C, n, *kernel)
        grouped = picked.reshape(self.groups, -1, picked.shape[1], math.prod(self.kernel))
        return np.ascontiguousarray(grouped.transpose(2, 0, 1, 3)).reshape(-1, self.groups, self.depth)

    def _padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        axes = len(self.kernel)
        if self.auto_pad in ("NOTSET", "VALID"):
            pads = self.pads if self.auto_pad == "NOTSET" else (0,) * (2 * axes)
            return [(pads[k], pads[k + axes]) for k in range(axes)]
        result = []
        for size, kernel, stride, dilation in zip(
            sizes, self.kernel, self.strides, self.dilations, strict=True
        ):
            windows = -(-size // stride)
            total = max(0, (windows - 1) * stride + (kernel - 1) * dilation + 1 - size)
            less = total // 2
            result.append((less, total - less) if self.auto_pad == "SAME_UPPER" else (total - less, less))
        return result


def spread(count: int, limit: int, width: int) -> np.ndarray:
    """Return at most ``limit`` evenly spaced numbers below ``count`` that visit every column of rows so wide."""
    step = max(1, -(-count // limit))
    while step > 1 and math.gcd(step, width) > 1:
        step += 1
    return np.arange(0, count, step)


def row_geometry(node: ir.Node) -> RowGeometry:
    """Return where the rows of an anchor lie.

    Raises:
        UsageError: The node is no MatMul, Gemm or Conv with a constant weight matrix.
    """
    weight = weight_of(node)
    shape = () if weight is None else weight_array(weight).shape
    if node.op_type in ("MatMul", "Gemm") and len(shape) == 2:
        transposed = node.op_type == "Gemm" and int_attribute(node, "transB", 0) == 1
        depth = shape[1] if transposed else shape[0]
        return RowGeometry(depth, transposed=node.op_type == "Gemm" and int_attribute(node, "transA", 0) == 1)
    if node.op_type == "Conv" and len(shape) >= 3:
        return _conv_geometry(node, shape)
    msg = "only a MatMul, Gemm or Conv with a constant weight multiplies rows with a matrix"
    raise UsageError(msg, where=f"node '{node_label(node)}'", fix="leave the node out")


def _conv_geometry(node: ir.Node, shape: tuple[int, ...]) -> RowGeometry:
    axes = len(shape) - 2
    ones = (1,) * axes
    return RowGeometry(
        math.prod(shape[1:]),
        int_attribute(node, "group", 1),
        kernel=tuple(shape[2:]),
        strides=ints_attribute(node, "strides", ones),
        dilations=ints_attribute(node, "dilations", ones),
        pads=ints_attribute(node, "pads", (0, 0) * axes),
        auto_pad=node.attributes.get_string("auto_pad", "NOTSET"),
    )
