"""How activations reach the dot product: as they lie in memory, or copied, padded and converted first."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    allocate_addressed,
    for_span,
    load,
    loop,
    splat,
    store,
    vector_type,
)

SIGN_SHIFT = {("int8", "uint8"): 128, ("uint8", "int8"): -128}


@dataclass(frozen=True)
class Staging:
    """The image that the dot product reads.

    Attributes:
        source: Element type of the activations.
        operand: Element type the instruction multiplies. Between uint8 and int8 the values move by 128, which
            the folded bias takes back; wider types hold the same values.
        height, width: Size of the image that is read, in pixels.
        slack: Elements that may be read behind the last pixel; they meet zero weights.
        copied: A copy is needed; else the parameter itself is read.
        fill: Integer in padding positions, already moved by ``shift``; 0 when there are none.
    """

    source: str
    operand: str
    height: int
    width: int
    slack: int
    copied: bool
    fill: int

    @property
    def shift(self) -> int:
        """What the conversion adds to every activation."""
        return SIGN_SHIFT.get((self.source, self.operand), 0)


def plan_staging(
    geometry: DotGeometry, source: str, operand: str, zero_point: int, overrun: int = 0
) -> Staging:
    """Decide whether activations must be copied: for padding, another type, or reads past a run's end.

    Args:
        geometry: Loop bounds.
        source: Element type of the activations.
        operand: Element type the instruction multiplies.
        zero_point: Of the activations; padding positions hold it.
        overrun: Elements read behind the end of a run.
    """
    padded = any(geometry.pads)
    copied = padded or source != operand or overrun > 0
    height, width = geometry.reach if copied else (geometry.height, geometry.width)
    fill = zero_point + SIGN_SHIFT.get((source, operand), 0) if padded else 0
    return Staging(source, operand, height, width, overrun, copied, fill)


def stage(activations: Buffer, geometry: DotGeometry, staging: Staging, *, parallel: bool) -> Buffer:
    """Emit the copy, if one is needed, and return the flat buffer that the dot product reads.

    Args:
        activations: Flat view of [N, H, W, C].
        geometry: Loop bounds.
        staging: What is needed.
        parallel: Spread the rows over threads.
    """
    if not staging.copied:
        return activations
    row = staging.width * geometry.channels
    length = geometry.batch * staging.height * row
    # Addressed: tile instructions read it by address, behind the last pixel too.
    staged = allocate_addressed(length + staging.slack, staging.operand)
    if geometry.height == geometry.batch == staging.height == 1 and not any(geometry.pads):
        for_span(row, lambda at, lanes: _copy(staged, at, activations, at, lanes, staging))
        return staged
    with loop(geometry.batch * staging.height, parallel=parallel) as line:
        _stage_row(activations, staged, line, geometry, staging)
    return staged


def _stage_row(
    activations: Buffer, staged: Buffer, line: Expr, geometry: DotGeometry, staging: Staging
) -> None:
    top, left, _, _ = geometry.pads
    row = staging.width * geometry.channels
    before = min(left, staging.width) * geometry.channels
    inside = max(0, min(geometry.width, staging.width - left)) * geometry.channels
    source_row = line % staging.height - top
    source = ((line // staging.height) * geometry.height + source_row) * geometry.width * geometry.channels

    def fill(start: int, length: int) -> None:
        for_span(length, lambda at, lanes: _fill(staged, line * row + start + at, lanes, staging))

    with T.If(tirx.all(source_row >= 0, source_row < geometry.height)):
        with T.Then():
            fill(0, before)
            for_span(
                inside,
                lambda at, lanes: _copy(
                    staged, line * row + before + at, activations, source + at, lanes, staging
                ),
            )
            fill(before + inside, row - before - inside)
        with T.Else():
            fill(0, row)


def _fill(staged: Buffer, at: Expr, lanes: int, staging: Staging) -> None:
    store(staged, splat(T.cast(staging.fill, staging.operand), lanes), [at], lanes)


def _copy(staged: Buffer, at: Expr, activations: Buffer, source: Expr, lanes: int, staging: Staging) -> None:
    store(staged, convert(load(activations, [source], lanes), staging, lanes), [at], lanes)


def convert(value: Expr, staging: Staging, lanes: int) -> Expr:
    """Convert loaded activations to the operand type; moving by 128 is flipping the sign bit."""
    if staging.shift:
        flipped = T.bitwise_xor(
            T.reinterpret(value, dtype=vector_type("uint8", lanes)), splat(T.uint8(128), lanes)
        )
        return T.reinterpret(flipped, dtype=vector_type(staging.operand, lanes))
    return T.cast(value, vector_type(staging.operand, lanes)) if staging.source != staging.operand else value
