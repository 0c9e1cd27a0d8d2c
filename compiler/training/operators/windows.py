"""Where the windows of convolutions and pooling lie."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor
from torch.nn import functional

from bitwright.compiler.graph.model import ints_attribute


@dataclass(frozen=True)
class Window:
    """The geometry of one node, a number a spatial dimension.

    Attributes:
        sizes: Of the window.
        strides: Between windows.
        dilations: Between its elements.
        begin, end: Padding.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether both sides are padded alike."""
        return self.begin == self.end


def window(node: ir.Node, spatial: tuple[int, ...], sizes: tuple[int, ...]) -> Window:
    """Read a node's strides, dilations and pads.

    Args:
        node: A convolution or a pooling.
        spatial: Sizes of the data's spatial dimensions.
        sizes: Of the window.
    """
    ones = (1,) * len(sizes)
    strides, dilations = ints_attribute(node, "strides", ones), ints_attribute(node, "dilations", ones)
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        begin, end = _same(spatial, sizes, strides, dilations, lower=automatic == "SAME_LOWER")
    else:
        pads = ints_attribute(node, "pads", (0,) * (2 * len(sizes)))
        begin, end = pads[: len(sizes)], pads[len(sizes) :]
    return Window(sizes, strides, dilations, begin, end)


def _same(
    spatial: tuple[int, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    *,
    lower: bool,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the pads that make as many windows as strides fit into the data."""
    begin, end = [], []
    for length, size, stride, dilation in zip(spatial, sizes, strides, dilations, strict=True):
        total = max(0, (-(-length // stride) - 1) * stride + (size - 1) * dilation + 1 - length)
        small = total // 2
        begin.append(total - small if lower else small)
        end.append(small if lower else total - small)
    return tuple(begin), tuple(end)


def padded(data: Tensor, form: Window, value: float) -> Tensor:
    """Return the data with its spatial dimensions padded by a value."""
    pads = [
        pad for pair in reversed(list(zip(form.begin, form.end, strict=True))) for pad in pair
    ]  # innermost dimension first
    return functional.pad(data, pads, value=value) if any(pads) else data
