"""Cycles of a schedule: its commands in the order of the lowered code, counted by the closed forms of the circuit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product

from bitwright.targets.npu.machine import PARAMETER_BYTES, Machine
from bitwright.targets.npu.tiling import Fetch, Grid, Tiling, fills, pixel_blocks

LOAD, TILE, STORE = range(3)
# Two bits each: which halves of a buffer, or which slot of parameters, a command uses.
IN_ACTIVATIONS, IN_WEIGHTS, IN_SUMS, IN_PARAMETERS = 1, 4, 16, 64


@dataclass(frozen=True)
class Command:
    """What the cycle model knows of a command.

    Attributes:
        unit: LOAD, TILE or STORE.
        uses: Bits of the halves that it reads or writes.
        cycles: From being taken until its unit takes another.
    """

    unit: int
    uses: int
    cycles: int


def halves(first: int, length: int, words: int) -> int:
    """Return which halves of a buffer a range of words lies in."""
    middle = words // 2
    return (1 if first < middle else 0) | (2 if first + length > middle else 0)


def count_cycles(commands: Iterable[Command]) -> int:
    """Return when the last command is done.

    A command is taken in the first cycle in which its unit is idle and no unit uses the halves it needs; one command a
    cycle at most, in order.
    """
    free, using, issue = [0, 0, 0], [0, 0, 0], 0
    for command in commands:
        unit, uses = command.unit, command.uses
        taken = max(issue, free[unit])
        for other in (LOAD, TILE, STORE):
            if using[other] & uses and free[other] > taken:
                taken = free[other]
        issue = taken + 1
        free[unit] = taken + command.cycles
        using[unit] = uses
    return max(free)


def command_bound(grid: Grid, tiling: Tiling, machine: Machine) -> int:
    """Return a number of cycles that no order of a schedule's commands can go below: that of its busiest unit."""
    blocks = pixel_blocks(grid, tiling)
    outer, depths = grid.blocks // tiling.outputs, grid.depth_units // tiling.depth
    visits = grid.groups * blocks * outer
    need = fills(grid, tiling)
    act = {"block": visits * depths, "strip": grid.groups * blocks, "group": grid.groups}
    wgt = {"block": visits * depths, "strip": grid.groups * outer, "group": grid.groups}
    loads = act[tiling.activations] * need.activations + wgt[tiling.weights] * need.weights
    if machine.weight_stationary:
        tiles = tiling.outputs * tiling.depth * machine.tile_cycles(tiling.pixels, reload=False)
    else:
        tiles = tiling.outputs * tiling.pixels * machine.tile_cycles(tiling.depth, reload=False)
    return max(loads, visits * depths * tiles)


@dataclass
class _Driver:
    """What npu_driver.c remembers, and the addresses of the buffers' fills."""

    grid: Grid
    tiling: Tiling
    machine: Machine
    slots: list[tuple[int, int] | None] = field(default_factory=lambda: [None, None])
    last_slot: int = 0
    array_weights: int = -1
    activations_at: int = 0
    weights_at: int = 0
    sums_at: int = 0
    filled: dict[str, int] = field(default_factory=lambda: {"activations": 0, "weights": 0, "sums": 0})

    def next_fill(self, buffer: str, doubled: bool, words: int) -> int:
        """Return where the next fill of a buffer begins: the halves take turns if it is doubled."""
        number = self.filled[buffer]
        self.filled[buffer] += 1
        return number % 2 * (words // 2) if doubled else 0

    def load_activations(self, pixels: int, depth: int) -> Iterator[Command]:
        """Load so many units of pixels with so many units of depth: one command for a unit of what lies outside."""
        m = self.machine
        at = self.next_fill("activations", self.tiling.double_activations, m.activation_words)
        self.activations_at = at
        count, words = (depth, pixels) if m.weight_stationary else (pixels, depth)
        for number in range(count):
            uses = IN_ACTIVATIONS * halves(at + number * words, words, m.activation_words)
            yield Command(LOAD, uses, m.load_cycles(words))

    def load_weights(self, blocks: int, depth: int) -> Iterator[Command]:
        """Load so many blocks of columns with so many units of depth."""
        m = self.machine
        at = self.next_fill("weights", self.tiling.double_weights, m.weight_words)
        self.weights_at = at
        words = depth * self.grid.depth_unit
        for number in range(blocks):
            first = at + number * words
            if self.array_weights < first + words and first < self.array_weights + m.rows:
                self.array_weights = -1
            yield Command(LOAD, IN_WEIGHTS * halves(first, words, m.weight_words), m.load_cycles(words))

    def tile(self, activations: int, weights: int, sums: int, words: int) -> Command:
        """Compute a tile; addresses are relative to the fills."""
        m = self.machine
        rows = words if m.weight_stationary else m.rows
        weight_at = self.weights_at + weights
        reload = m.weight_stationary and weight_at != self.array_weights
        self.array_weights = weight_at
        read = (m.rows if reload else 0) if m.weight_stationary else words
        uses = IN_ACTIVATIONS * halves(self.activations_at + activations, words, m.activation_words)
        uses |= IN_WEIGHTS * halves(weight_at, read, m.weight_words) if read else 0
        uses |= IN_SUMS * halves(self.sums_at + sums, rows, m.accumulator_words)
        return Command(TILE, uses, m.tile_cycles(words, reload))

    def store(self, channels: tuple[int, int], sums: int, rows: int) -> Iterator[Command]:
        """Store rows of sums; the parameters of their channels are loaded first unless they are in a slot."""
        m = self.machine
        if self.slots[self.last_slot] != channels:
            self.last_slot = 1 - self.last_slot
            if self.slots[self.last_slot] != channels:
                self.slots[self.last_slot] = channels
                yield Command(LOAD, IN_PARAMETERS << self.last_slot, m.load_cycles(PARAMETER_BYTES))
        uses = IN_SUMS * halves(self.sums_at + sums, rows, m.accumulator_words)
        yield Command(STORE, uses | IN_PARAMETERS << self.last_slot, m.store_cycles(rows))


def commands(grid: Grid, tiling: Tiling, machine: Machine) -> Iterator[Command]:
    """Yield the commands of a schedule, as the lowered code gives them."""
    driver = _Driver(grid, tiling, machine)
    whole_pixels = pixel_blocks(grid, tiling) * tiling.pixels
    pixel_range, output_range = range(pixel_blocks(grid, tiling)), range(grid.blocks // tiling.outputs)
    for group in range(grid.groups):
        if tiling.activations == "group":
            yield from driver.load_activations(whole_pixels, grid.depth_units)
        if tiling.weights == "group":
            yield from driver.load_weights(grid.blocks, grid.depth_units)
        outer, inner = (pixel_range, output_range) if tiling.pixels_outer else (output_range, pixel_range)
        for first in outer:
            if tiling.activations == "strip":
                yield from driver.load_activations(tiling.pixels, grid.depth_units)
            if tiling.weights == "strip":
                yield from driver.load_weights(tiling.outputs, grid.depth_units)
            for second in inner:
                pixel, output = (first, second) if tiling.pixels_outer else (second, first)
                yield from _block(driver, group, pixel, output)


def _block(driver: _Driver, group: int, pixel: int, output: int) -> Iterator[Command]:
    """Yield the commands of one block of results."""
    grid, tiling, machine = driver.grid, driver.tiling, driver.machine
    driver.sums_at = driver.next_fill("sums", tiling.double_sums, machine.accumulator_words)
    for depth in range(grid.depth_units // tiling.depth):
        if tiling.activations == "block":
            yield from driver.load_activations(tiling.pixels, tiling.depth)
        if tiling.weights == "block":
            yield from driver.load_weights(tiling.outputs, tiling.depth)
        yield from _tiles(driver, pixel, output, depth)
    rows = tiling.pixels if machine.weight_stationary else machine.rows
    for column, row in product(
        range(tiling.outputs), range(1 if machine.weight_stationary else tiling.pixels)
    ):
        sums = column * tiling.pixels if machine.weight_stationary else (row * tiling.outputs + column) * rows
        yield from driver.store((group, output * tiling.outputs + column), sums, rows)


def _tiles(driver: _Driver, pixel: int, output: int, depth: int) -> Iterator[Command]:
    """Yield the tiles of one block of depth."""
    grid, tiling, machine = driver.grid, driver.tiling, driver.machine
    # Where the block begins in what was fetched for more than the block, in units.
    pixel_at = pixel * tiling.pixels if tiling.activations == "group" else 0
    output_at = output * tiling.outputs if tiling.weights == "group" else 0
    act_depth, act_at = _depth(tiling.activations, grid, tiling, depth)
    wgt_depth, wgt_at = _depth(tiling.weights, grid, tiling, depth)
    if machine.weight_stationary:
        pixels = (
            pixel_blocks(grid, tiling) * tiling.pixels if tiling.activations == "group" else tiling.pixels
        )
        for part, column in product(range(tiling.depth), range(tiling.outputs)):
            activations = (act_at + part) * pixels + pixel_at
            weights = ((output_at + column) * wgt_depth + wgt_at + part) * machine.rows
            yield driver.tile(activations, weights, column * tiling.pixels, tiling.pixels)
        return
    for row, column in product(range(tiling.pixels), range(tiling.outputs)):
        activations = (pixel_at + row) * act_depth + act_at
        weights = (output_at + column) * wgt_depth + wgt_at
        sums = (row * tiling.outputs + column) * machine.rows
        yield driver.tile(activations, weights, sums, tiling.depth)


def _depth(fetch: Fetch, grid: Grid, tiling: Tiling, block: int) -> tuple[int, int]:
    """Return the depth of a fill, and where a block of depth begins in it, both in units."""
    return (tiling.depth, 0) if fetch == "block" else (grid.depth_units, block * tiling.depth)
