"""Sliding windows: an image row by row becomes the pixels under each position of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.targets.fpga.network import Engine


@dataclass(frozen=True)
class Window:
    """How a kernel moves over an image.

    Attributes:
        channels: Channels of the image.
        image: (H, W) of the input.
        kernel: (KH, KW).
        strides: (SH, SW).
        pads: (top, left, bottom, right).
        output: (OH, OW).
        fill: The integer that stands outside the image.
    """

    channels: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    output: tuple[int, int]
    fill: int

    @property
    def taps(self) -> int:
        """Pixels under the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def trivial(self) -> bool:
        """Whether the windows are the image's pixels in their order."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and self.pads == (0, 0, 0, 0)

    @property
    def whole(self) -> bool:
        """Whether there is one window, the image."""
        return self.output == (1, 1) and self.kernel == self.image and self.pads == (0, 0, 0, 0)

    @property
    def rows(self) -> int:
        """Rows that the circuit stores: a kernel's, what the next position adds, and none waits between frames."""
        first = min(self.kernel[0] - self.pads[0], self.image[0])
        start = (self.output[0] - 1) * self.strides[0] - self.pads[0]
        last = max(self.image[0] - max(start, 0), 1)
        return max(min(self.kernel[0], self.image[0]) + self.strides[0], first + last)

    def cycles(self, lanes: int) -> int:
        """Return the cycles of a frame: every pixel is written once and read once a window."""
        groups = self.channels // lanes
        read = self.output[0] * self.output[1] * self.taps * groups
        return max(self.image[0] * self.image[1] * groups, read)

    def engine(self, name: str, node: str, lanes: int, *, taps_inside: bool) -> Engine:
        """Return the engine.

        Args:
            name: Its name.
            node: The node it serves.
            lanes: Channels side by side.
            taps_inside: All taps of one group of channels follow each other (depthwise); otherwise all channels of
                one tap.
        """
        groups = self.channels // lanes
        return Engine(
            name=f"{name}_window",
            node=node,
            module="sliding_window",
            parameters={
                "LANES": lanes,
                "GROUPS": groups,
                "H": self.image[0],
                "W": self.image[1],
                "KH": self.kernel[0],
                "KW": self.kernel[1],
                "SH": self.strides[0],
                "SW": self.strides[1],
                "TOP": self.pads[0],
                "LEFT": self.pads[1],
                "OH": self.output[0],
                "OW": self.output[1],
                "ROWS": self.rows,
                "FILL": self.fill,
                "TAPS_INSIDE": int(taps_inside),
            },
            cycles=self.cycles(lanes),
            capacity=(self.rows + 1) * self.image[1] * self.channels,
            note=f"windows {self.kernel[0]}x{self.kernel[1]} of {self.image[0]}x{self.image[1]}x{self.channels}",
        )
