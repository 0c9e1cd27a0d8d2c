"""Sliding windows: an image row by row becomes the pixels under each position of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.targets.fpga.network import Engine, Memory


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
        bits: Of the image's integers.
    """

    channels: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    output: tuple[int, int]
    fill: int
    bits: int = 8

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

    def retained(self) -> list[tuple[int, int]]:
        """Return for every output row which rows [first, end) it keeps; the last one waits for the whole image."""
        height, reach = self.image[0], max(self.kernel[0], self.strides[0])
        tops = [row * self.strides[0] - self.pads[0] for row in range(self.output[0])]
        ends = [min(top + reach, height) for top in tops[:-1]] + [height]
        return [(min(max(top, 0), height), end) for top, end in zip(tops, ends, strict=True)]

    @property
    def rows(self) -> int:
        """Rows that the circuit stores: a kernel's, what the next position adds, and none waits between frames."""
        kept = [end - first for first, end in self.retained()]
        return max(*kept, min(self.kernel[0], self.image[0]) + self.strides[0], kept[-1] + kept[0])

    def plan(self) -> Memory:
        """Return for every output row ``{rows the next one needs more, rows given back}``; the last starts a frame."""
        height, kept = self.image[0], self.retained()
        following = [*kept[1:], (height + kept[0][0], height + kept[0][1])]
        pairs = zip(kept, following, strict=True)
        return Memory(32, tuple((b[1] - a[1]) << 16 | (b[0] - a[0]) for a, b in pairs))

    def cycles(self, lanes: int) -> int:
        """Return the cycles of a frame: every pixel is written once and read once a window."""
        groups = self.channels // lanes
        row = self.output[1] * self.taps * groups
        read = self.output[0] * (row if row > 1 else 2)
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
                "ACT_BITS": self.bits,
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
                "NEED": self.retained()[0][1],
                "FILL": self.fill,
                "TAPS_INSIDE": int(taps_inside),
            },
            cycles=self.cycles(lanes),
            capacity=(self.rows + 1) * self.image[1] * self.channels,
            memories={"ROW_FILE": self.plan},
            note=f"windows {self.kernel[0]}x{self.kernel[1]} of {self.image[0]}x{self.image[1]}x{self.channels}",
        )
