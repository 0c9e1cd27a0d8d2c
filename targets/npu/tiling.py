"""How a product is cut into tiles, in which order, and where its operands wait in the buffers: the space of schedules.

The loops of a schedule, outermost first::

    group, outer, inner, depth block        outer and inner: blocks of pixels and of outputs, in either order
        tile of pixels, tile of outputs     one command of the array each; for a weight stationary array behind a loop
                                            over the block's words of depth

An operand is fetched inside the loop over depth blocks, or once for the block of its own outermost loop with the whole
depth (it is reused by the loop inside), or once for the group. A buffer is *doubled* where two fills fit its two
halves: one is filled while the other is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.problem import SHORTEST, Problem, output_blocks, padded_depth

Fetch = Literal["block", "strip", "group"]
FETCHES: tuple[Fetch, ...] = ("block", "strip", "group")
# Rounding the pixels up to whole blocks may waste at most one part in so many.
WASTE = 8


@dataclass(frozen=True)
class Grid:
    """A product in units of the array.

    Attributes:
        groups: Products.
        pixels: Rows, not rounded up.
        pixel_unit: Rows of a tile as the array takes them: its own rows, or one.
        blocks: Blocks of columns.
        depth: Words of weights of a block of columns.
        depth_unit: Words of depth of a tile: one, or the array's rows.
    """

    groups: int
    pixels: int
    pixel_unit: int
    blocks: int
    depth: int
    depth_unit: int

    @property
    def pixel_units(self) -> int:
        """Pixels in units, rounded up."""
        return -(-self.pixels // self.pixel_unit)

    @property
    def depth_units(self) -> int:
        """Depth in units."""
        return self.depth // self.depth_unit


def grid_of(problem: Problem, machine: Machine) -> Grid:
    """Return the grid of a product."""
    stationary = machine.weight_stationary
    return Grid(
        problem.groups,
        max(problem.pixels, SHORTEST) if stationary else problem.pixels,
        1 if stationary else machine.rows,
        output_blocks(problem, machine),
        padded_depth(problem, machine),
        machine.rows if stationary else 1,
    )


@dataclass(frozen=True, order=True)
class Tiling:
    """One schedule.

    Attributes:
        pixels: Units of pixels in a block.
        outputs: Blocks of columns in a block.
        depth: Units of depth in a block.
        pixels_outer: The loop over blocks of pixels is around that over blocks of outputs.
        activations, weights: Where the operands are fetched.
        double_activations, double_weights, double_sums: Their buffers are doubled.
    """

    pixels: int
    outputs: int
    depth: int
    pixels_outer: bool = True
    activations: Fetch = "block"
    weights: Fetch = "block"
    double_activations: bool = False
    double_weights: bool = False
    double_sums: bool = False

    def label(self) -> str:
        """Return it in a few words."""
        order = "pixels, outputs" if self.pixels_outer else "outputs, pixels"
        doubled = "".join(
            letter
            for letter, on in (
                ("a", self.double_activations),
                ("w", self.double_weights),
                ("s", self.double_sums),
            )
            if on
        )
        return (
            f"{self.pixels}x{self.outputs}x{self.depth} {order}; activations by {self.activations}, weights by "
            f"{self.weights}; doubled: {doubled or 'none'}"
        )


@dataclass(frozen=True)
class Fills:
    """Words of one fill of each buffer."""

    activations: int
    weights: int
    sums: int


def pixel_blocks(grid: Grid, tiling: Tiling) -> int:
    """Return the blocks of pixels, the last of which may be partly empty."""
    return -(-grid.pixel_units // tiling.pixels)


def fills(grid: Grid, tiling: Tiling) -> Fills:
    """Return what a schedule keeps in the buffers at once."""
    pixels = pixel_blocks(grid, tiling) * tiling.pixels
    # A word of activations is one index of depth of a unit of pixels, or one pixel of a unit of depth.
    depth = {"block": tiling.depth, "strip": grid.depth_units, "group": grid.depth_units}
    rows = {"block": tiling.pixels, "strip": tiling.pixels, "group": pixels}
    columns = {"block": tiling.outputs, "strip": tiling.outputs, "group": grid.blocks}
    return Fills(
        rows[tiling.activations] * depth[tiling.activations],
        columns[tiling.weights] * depth[tiling.weights] * grid.depth_unit,
        tiling.pixels * grid.pixel_unit * tiling.outputs,
    )


def is_legal(grid: Grid, tiling: Tiling, machine: Machine) -> bool:
    """Tell whether the buffers hold a schedule's fills."""
    needs = fills(grid, tiling)
    checks = (
        (needs.activations, tiling.double_activations, machine.activation_words),
        (needs.weights, tiling.double_weights, machine.weight_words),
        (needs.sums, tiling.double_sums, machine.accumulator_words),
    )
    return all(words <= (total // 2 if doubled else total) for words, doubled, total in checks)


def legal_tilings(grid: Grid, machine: Machine) -> Iterator[Tiling]:
    """Yield the legal schedules, the simplest first: the smallest blocks, nothing reused, nothing doubled.

    The first one is the array's own size in every direction.
    """
    for depth in _depths(grid, machine):
        for outputs in _divisors(grid.blocks):
            for pixels in _pixels(grid, machine):
                for tiling in _variants(pixels, outputs, depth):
                    if is_legal(grid, tiling, machine):
                        yield tiling


def _variants(pixels: int, outputs: int, depth: int) -> Iterator[Tiling]:
    for doubled in (False, True):
        for outer in (True, False):
            for activations in FETCHES:
                for weights in FETCHES:
                    # A strip is reused by the loop inside its own.
                    if (activations == "strip" and not outer) or (weights == "strip" and outer):
                        continue
                    yield Tiling(pixels, outputs, depth, outer, activations, weights, *_doubling(doubled))
    # What is fetched once for the group need not be doubled, and may fill its buffer.
    for outer in (True, False):
        yield Tiling(pixels, outputs, depth, outer, "group", "block", False, True, True)
        yield Tiling(pixels, outputs, depth, outer, "block", "group", True, False, True)
    yield Tiling(pixels, outputs, depth, True, "strip", "block", False, True, True)
    yield Tiling(pixels, outputs, depth, False, "block", "strip", True, False, True)


def _doubling(doubled: bool) -> tuple[bool, bool, bool]:
    return doubled, doubled, doubled


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _depths(grid: Grid, machine: Machine) -> list[int]:
    """Return depths of blocks, the array's own size first: shorter ones would only start it more often."""
    divisors = _divisors(grid.depth_units)
    own = 1 if machine.weight_stationary else machine.rows
    return [d for d in divisors if d >= own] or divisors[-1:]


def _pixels(grid: Grid, machine: Machine) -> list[int]:
    """Return sizes of blocks of pixels, in units; blocks that waste more than a small part are left out."""
    units = grid.pixel_units
    least = min(machine.rows, units) if machine.weight_stationary else 1
    most = max(1, min(units, machine.accumulator_words // grid.pixel_unit))
    sizes = sorted({-(-units // blocks) for blocks in range(1, units + 1)} | {least})
    return [s for s in sizes if (least <= s <= most and (-units % s) * WASTE <= units) or s == least]
