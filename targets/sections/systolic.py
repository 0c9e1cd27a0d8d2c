"""A systolic array of multiply-accumulators, described so that circuit, cycles and kernels follow from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bitwright.targets.sections.record import Count, Positive, Strict

# Addresses and counts in commands have 16 bits.
LARGEST_BUFFER_WORDS = 32768
Side = Annotated[int, Field(ge=2, le=128)]


class CellArea(Strict):
    """What one multiply-accumulator takes.

    Attributes:
        weight_bits: Width of its weights.
        output_stationary, weight_stationary: Gate equivalents (areas of a two-input NAND) of a cell of each dataflow.
    """

    weight_bits: Annotated[int, Field(ge=2, le=8)]
    output_stationary: Positive
    weight_stationary: Positive


class SystolicArea(Strict):
    """Areas by bit width, without memories.

    Attributes:
        source: Where the figures come from.
        cells: One row for each width of weights.
        requantize_lane: Gate equivalents of one lane of the requantization unit.
        nand2_um2: Area of the two-input NAND that areas are converted with, or None.
    """

    source: str = Field(min_length=10)
    cells: tuple[CellArea, ...] = Field(min_length=1)
    requantize_lane: Positive
    nand2_um2: Positive | None = None


class SystolicArray(Strict):
    """The array and its buffers.

    Attributes:
        rows, columns: Multiply-accumulators each way.
        dataflow: What stays in place while the others stream.
        activation_buffer_bytes, weight_buffer_bytes, accumulator_buffer_bytes: On-chip memories. Their words are
            ``rows`` bytes, ``columns`` bytes and ``columns`` sums of 32 bits; half of each can be used while the other
            half is filled.
        weight_bits: Width of the weights that the cells multiply.
        area: Areas of cells, for an estimate without a cell library.
        liberty: Path of a cell library (Liberty); the circuit is synthesized with it.
    """

    rows: Side
    columns: Side
    dataflow: Literal["output_stationary", "weight_stationary"]
    activation_buffer_bytes: Count
    weight_buffer_bytes: Count
    accumulator_buffer_bytes: Count
    weight_bits: Annotated[int, Field(ge=2, le=8)] = 8
    area: SystolicArea | None = None
    liberty: str | None = None
