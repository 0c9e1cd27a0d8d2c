"""Loop bounds of a Gemm or convolution, seen as one channels-last implicit matrix product."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from bitwright.compiler.errors import InternalError
from bitwright.compiler.program.ops import Dot, Program, QConv, QGemm, Step


@dataclass(frozen=True)
class DotGeometry:
    """A dot-product step as the kernels see it.

    A Gemm, and a 1x1 convolution that touches every pixel once, is one image of height 1 whose width is the
    number of rows M and whose channels are K.

    Attributes:
        input_shape: Physical shape of the activation buffer, channels last.
        output_shape: Physical shape of the output buffer, channels last.
        batch, height, width, channels: Activations.
        out_height, out_width, outputs: Output pixels and channels.
        kernel: (KH, KW).
        strides: (SH, SW).
        pads: (top, left, bottom, right).
        dilations: (DH, DW).
        group: Divides ``channels`` and ``outputs``.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    batch: int
    height: int
    width: int
    channels: int
    out_height: int
    out_width: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    group: int = 1

    @property
    def rows(self) -> int:
        """Output rows of all images."""
        return self.batch * self.out_height

    @property
    def pixels(self) -> int:
        """Output pixels of all images: M of the matrix product."""
        return self.rows * self.out_width

    @property
    def group_channels(self) -> int:
        """Input channels an output reads."""
        return self.channels // self.group

    @property
    def group_outputs(self) -> int:
        """Output channels of one group."""
        return self.outputs // self.group

    @property
    def taps(self) -> tuple[int, int]:
        """(rows, columns) of kernel positions that start a new contiguous run of activations.

        Without groups and horizontal dilation a whole kernel row (KW, IC) is contiguous in memory.
        """
        merged = self.group == 1 and self.dilations[1] == 1
        return self.kernel[0], 1 if merged else self.kernel[1]

    @property
    def run(self) -> int:
        """Contiguous reduction elements behind one tap."""
        return self.kernel[1] // self.taps[1] * self.group_channels

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return self.pixels * self.outputs * prod(self.kernel) * self.group_channels

    @property
    def is_depthwise(self) -> bool:
        """One input and one output channel a group."""
        return self.group > 1 and self.group == self.channels == self.outputs

    @property
    def reach(self) -> tuple[int, int]:
        """(height, width) of the padded image that the kernel really reads."""
        out = (self.out_height, self.out_width)
        high, wide = (
            (o - 1) * s + (k - 1) * d + 1
            for o, s, k, d in zip(out, self.strides, self.kernel, self.dilations, strict=True)
        )
        return high, wide


def geometry_of(step: Step, program: Program) -> DotGeometry:
    """Return the loop bounds of a QGemm or QConv step.

    Raises:
        InternalError: The step is neither, or its tensors do not fit its weight.
    """
    if not isinstance(step, Dot):
        what = f"{type(step).__name__} is not a dot product"
        raise InternalError(what, where=step.name)
    shape, out = program.tensor(step.inputs[0]).shape, program.tensor(step.output).shape
    geometry = _gemm(shape, out, step) if isinstance(step, QGemm) else _conv(shape, out, step)
    if prod(geometry.output_shape) != geometry.pixels * geometry.outputs:
        what = f"output shape {out} does not fit input {shape} and weight {step.weight.shape}"
        raise InternalError(what, where=step.name)
    return geometry


def _gemm(shape: tuple[int, ...], out: tuple[int, ...], step: QGemm) -> DotGeometry:
    k, n = step.weight.shape
    m = prod(shape[:-1])
    return DotGeometry(shape, out, 1, 1, m, k, 1, m, n)


def _conv(shape: tuple[int, ...], out: tuple[int, ...], step: Dot) -> DotGeometry:
    if not isinstance(step, QConv):
        what = f"no kernel for {type(step).__name__}"
        raise InternalError(what, where=step.name)
    (n, c, h, w), (_, o, oh, ow) = shape, out
    kernel = (step.weight.shape[2], step.weight.shape[3])
    physical, result = (n, h, w, c), (n, oh, ow, o)
    pointwise = kernel == (1, 1) and step.strides == (1, 1) and not any(step.pads) and step.group == 1
    if pointwise:
        return DotGeometry(physical, result, 1, 1, n * h * w, c, 1, n * oh * ow, o)
    return DotGeometry(
        physical, result, n, h, w, c, oh, ow, o, kernel, step.strides, step.pads, step.dilations, step.group
    )
