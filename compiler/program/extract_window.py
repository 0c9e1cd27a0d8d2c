"""Geometry of sliding windows: padding of Conv and pooling nodes made explicit."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bitwright.compiler.graph.model import ints_attribute

Pair = tuple[int, int]
Quad = tuple[int, int, int, int]


@dataclass(frozen=True)
class Window:
    """A 2-D sliding window.

    Attributes:
        kernel: (KH, KW).
        strides: (SH, SW).
        pads: (top, left, bottom, right), explicit.
        dilations: (DH, DW).
    """

    kernel: Pair
    strides: Pair
    pads: Quad
    dilations: Pair

    def output_size(self, image: Pair) -> Pair:
        """Return (OH, OW) for an image of (H, W), rounding down."""
        return self._output(image, 0), self._output(image, 1)

    def reach(self, axis: int) -> int:
        """Return how many rows (axis 0) or columns (1) one dilated window spans."""
        return (self.kernel[axis] - 1) * self.dilations[axis] + 1

    def _output(self, image: Pair, axis: int) -> int:
        padded = image[axis] + self.pads[axis] + self.pads[axis + 2]
        return (padded - self.reach(axis)) // self.strides[axis] + 1

    def covered(self, image: Pair, axis: int, position: int) -> int:
        """Return how many window elements of output ``position`` along ``axis`` lie inside the image."""
        start = position * self.strides[axis] - self.pads[axis]
        taps = (start + k * self.dilations[axis] for k in range(self.kernel[axis]))
        return sum(0 <= t < image[axis] for t in taps)

    def always_inside(self, image: Pair, output: Pair) -> bool:
        """Tell whether every window has at least one element inside the image."""
        return all(self.covered(image, a, o) > 0 for a in (0, 1) for o in range(output[a]))


def window_of(node: ir.Node, kernel: tuple[int, ...], image: Pair) -> Window | None:
    """Read strides, dilations and padding of a 2-D node.

    Args:
        node: Conv, MaxPool or AveragePool.
        kernel: Kernel sizes; must be two.
        image: (H, W) of the input.

    Returns:
        The window with ``auto_pad`` resolved, or None when it is not 2-D or pads are negative.
    """
    if len(kernel) != 2:
        return None
    strides = ints_attribute(node, "strides", (1, 1))
    dilations = ints_attribute(node, "dilations", (1, 1))
    pads = ints_attribute(node, "pads", (0, 0, 0, 0))
    if len(strides) != 2 or len(dilations) != 2 or len(pads) != 4:
        return None
    shape = (kernel[0], kernel[1]), (strides[0], strides[1]), (dilations[0], dilations[1])
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode == "VALID":
        pads = (0, 0, 0, 0)
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same_pads(
            Window(shape[0], shape[1], (0, 0, 0, 0), shape[2]), image, upper=mode == "SAME_UPPER"
        )
    if min(pads) < 0:
        return None
    return Window(shape[0], shape[1], (pads[0], pads[1], pads[2], pads[3]), shape[2])


def _same_pads(window: Window, image: Pair, *, upper: bool) -> Quad:
    small, large = [], []
    for axis in (0, 1):
        outputs = -(-image[axis] // window.strides[axis])
        total = max((outputs - 1) * window.strides[axis] + window.reach(axis) - image[axis], 0)
        small.append(total // 2)
        large.append(total - total // 2)
    first, last = (small, large) if upper else (large, small)
    return first[0], first[1], last[0], last[1]


def pool_kernel(node: ir.Node, image: Pair) -> tuple[int, ...]:
    """Return the kernel of a pooling node; global pooling covers the image."""
    return image if node.op_type.startswith("Global") else ints_attribute(node, "kernel_shape", ())
