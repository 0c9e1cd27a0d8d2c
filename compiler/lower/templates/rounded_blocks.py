"""Float activations rounded to 8 bits in groups: integers, a scale and a sum for every group of every row."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    allocate,
    load,
    loop,
    pieces,
    splat,
    store,
    vector_type,
)
from bitwright.compiler.program.ops import SMALLEST_ACTIVATION

MAGNITUDE, INFINITE = 0x7FFFFFFF, 0x7F800000
LARGEST = 127.0
# Fewer rows than this are rounded faster than threads start.
MIN_PARALLEL_ROWS = 8


@dataclass(frozen=True)
class BlockRounding:
    """What is rounded.

    Attributes:
        rows: M.
        depth: K.
        group: Activations that share a scale; the last group of a row may be short.
        stride: Bytes from one group's integers to the next: ``group``, or more, filled with zeros.
        lanes: float32 lanes of a vector register.
        factor: Sums are multiplied by this.
    """

    rows: int
    depth: int
    group: int
    stride: int
    lanes: int
    factor: int

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-self.depth // self.group)


@dataclass(frozen=True)
class RoundedBlocks:
    """Flat scratch buffers.

    Attributes:
        integers: int8 [rows, groups, stride].
        scales: float32 [rows, groups].
        sums: int32 [rows, groups]: the sum of a group's integers times ``factor``.
    """

    integers: Buffer
    scales: Buffer
    sums: Buffer


def round_blocks(x: Buffer, plan: BlockRounding, *, parallel: bool) -> RoundedBlocks:
    """Emit the rounding of ``x``, a flat float32 [rows, depth], as ``WeightOnlyDot`` defines it."""
    cells = plan.rows * plan.groups
    blocks = RoundedBlocks(
        allocate((cells * plan.stride,), "int8"),
        allocate((cells,), "float32"),
        allocate((cells,), "int32"),
    )
    full, rest = divmod(plan.depth, plan.group)
    with loop(plan.rows, parallel=parallel and plan.rows >= MIN_PARALLEL_ROWS) as row:
        if full:
            with loop(full) as group:
                _round_group(x, blocks, plan, row, group, plan.group)
        if rest:
            _round_group(x, blocks, plan, row, full, rest)
    return blocks


def _round_group(
    x: Buffer, blocks: RoundedBlocks, plan: BlockRounding, row: Expr, group: Expr, length: int
) -> None:
    source, cell = row * plan.depth + group * plan.group, row * plan.groups + group
    parts = list(pieces(length, plan.lanes))
    top = allocate((1,), "int32", "local")
    store(top, _largest([_bits(load(x, [source + at], lanes), lanes) for at, lanes in parts], parts), [0])
    bits = load(top, [0])
    value = T.reinterpret(bits, dtype="float32")
    usable = T.And(bits < INFINITE, value >= T.float32(SMALLEST_ACTIVATION))
    scale = T.Select(bits < INFINITE, value / T.float32(LARGEST), T.float32(float("nan")))
    store(blocks.scales, scale, [cell])
    reciprocal = allocate((1,), "float32", "local")
    store(reciprocal, T.Select(usable, T.float32(LARGEST) / value, T.float32(0)), [0])
    rounded = [_rounded(load(x, [source + at], lanes), load(reciprocal, [0]), lanes) for at, lanes in parts]
    for (at, lanes), steps in zip(parts, rounded, strict=True):
        store(blocks.integers, T.cast(steps, vector_type("int8", lanes)), [cell * plan.stride + at], lanes)
    for at, lanes in pieces(plan.stride - length, 4 * plan.lanes):
        zeros = splat(T.int8(0), lanes)
        store(blocks.integers, zeros, [cell * plan.stride + length + at], lanes)
    store(blocks.sums, _total(rounded, parts) * plan.factor, [cell])


def _bits(x: Expr, lanes: int) -> Expr:
    return T.bitwise_and(
        T.reinterpret(x, dtype=vector_type("int32", lanes)), splat(T.int32(MAGNITUDE), lanes)
    )


def _rounded(x: Expr, reciprocal: Expr, lanes: int) -> Expr:
    """Return int32 steps; the clamp only gives infinity and NaN, whose scale is NaN, some defined integer."""
    steps = T.nearbyint(x * splat(reciprocal, lanes))
    clamped = T.max(T.min(steps, splat(T.float32(LARGEST), lanes)), splat(T.float32(-LARGEST), lanes))
    return T.cast(clamped, vector_type("int32", lanes))


def _largest(vectors: list[Expr], parts: list[tuple[int, int]]) -> Expr:
    return _combined(vectors, parts, T.max, "smax")


def _total(vectors: list[Expr], parts: list[tuple[int, int]]) -> Expr:
    return _combined(vectors, parts, lambda a, b: a + b, "add")


def _combined(vectors: list[Expr], parts: list[tuple[int, int]], combine: object, name: str) -> Expr:
    """Combine vectors of equal width lane by lane, then the lanes, then what is left of each width."""
    assert callable(combine)
    by_width: dict[int, Expr] = {}
    for (_, lanes), vector in zip(parts, vectors, strict=True):
        by_width[lanes] = combine(by_width[lanes], vector) if lanes in by_width else vector
    scalars = [
        v if lanes == 1 else T.call_llvm_pure_intrin(f"llvm.vector.reduce.{name}", v, dtype="int32")
        for lanes, v in by_width.items()
    ]
    result = scalars[0]
    for scalar in scalars[1:]:
        result = combine(result, scalar)
    return result
