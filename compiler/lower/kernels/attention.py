"""Attention over a cache of fixed capacity: new rows are written into the buffers of the cache, in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float.functions import exp
from bitwright.compiler.lower.float.vectors import across, keep, multiply_add, number
from bitwright.compiler.lower.kernels.attention_block import QUERIES, BlockAttention
from bitwright.compiler.lower.kernels.loops import View, kernel
from bitwright.compiler.lower.layout import row_major
from bitwright.compiler.lower.templates.scaffold import allocate, load, loop, pieces, splat, store
from bitwright.compiler.program.ops import CachedAttention, Program
from bitwright.targets.backend import Kernel

Expr = Any
# Numbers of a vector; a target with shorter registers takes several of them.
LANES = 16
# Sums that are carried through a loop at once: enough to hide the latency of a multiply-add.
ACCUMULATORS = 4
# Multiply-adds below which waking other threads takes longer.
PARALLEL_MIN_PRODUCTS = 1 << 17
# Hides what a vector has behind the last position.
LOWEST = -3.0e38


def cached_attention(step: CachedAttention, program: Program) -> Kernel:
    """Return the kernel; its caches are inputs that it writes to.

    One task computes a head of keys and values with all the queries that share it, so no two write to the same rows.
    """
    orders = {name: row_major(len(program.tensor(name).shape)) for name in (*step.inputs, step.outputs[0])}
    length = program.tensor(step.inputs[0]).shape[1]
    capacity = program.tensor(step.inputs[4]).shape[2]

    def emit(views: list[View], tables: list[Any], output: View) -> None:
        _Emitter(step, length, capacity, [_flat(v) for v in (*views, output)], tables).emit()

    return kernel(
        "cached_attention",
        program,
        orders,
        (step.inputs, step.outputs[0]),
        (step.cos, step.sin),
        emit,
        (step.heads, step.key_heads, step.width, step.window),
    )


def _flat(view: View) -> Any:
    return T.decl_buffer((prod(view.shape),), view.buffer.dtype, data=view.buffer.data)


@dataclass
class _Emitter:
    """Writes the loops.

    Attributes:
        step: Heads and their width.
        length: New rows.
        capacity: Rows of a cache.
        buffers: Query, key, value, last position, both caches, output; flat.
        tables: Cosines and sines, [positions, width / 2].
    """

    step: CachedAttention
    length: int
    capacity: int
    buffers: Sequence[Any]
    tables: Sequence[Any]

    def __post_init__(self) -> None:
        self.query, self.key, self.value, self.last, self.keys, self.values, self.output = self.buffers
        self.width = self.step.width
        self.sharing = self.step.heads // self.step.key_heads
        self.padded = -(-self.capacity // LANES) * LANES

    def emit(self) -> None:
        """Emit one task for each head of keys, by threads where there is enough to do."""
        heads = self.step.key_heads
        # A position that a caller got wrong must not lead outside the buffers.
        first = T.max(T.min(load(self.last, [0]) + (1 - self.length), self.capacity), 0)
        start = allocate((1,), "int32", "local")
        store(start, first, [0])
        products = (load(start, [0]) + self.length) * (2 * self.length * self.step.heads * self.width)
        with T.If(products >= PARALLEL_MIN_PRODUCTS):
            with T.Then(), loop(heads, parallel=True) as head:
                self.task(head, load(start, [0]))
            with T.Else(), loop(heads) as head:
                self.task(head, load(start, [0]))

    def task(self, head: Expr, start: Expr) -> None:
        """Append the new rows of one head, then compute the queries that read it."""
        first = keep(start)
        with loop(self.length) as row, T.If(first + row < self.capacity), T.Then():
            self.append(head, row, first + row)
        if self.length * self.sharing >= QUERIES:
            self.blocks(head, first).emit(head * (self.capacity * self.width), first)
            return
        turned = allocate((self.sharing * self.width,), "float32")
        scores = allocate((self.sharing * self.padded,), "float32")
        seen = allocate((2,), "int32")
        with loop(self.length) as row:
            end = keep(T.min(first + row + 1, self.capacity))
            # How many positions are seen, and the first of them.
            store(seen, end if self.step.window is None else T.min(end, self.step.window), [0])
            store(seen, end - load(seen, [0]), [1])
            self.attend(head, row, first + row, (turned, scores, seen))

    def blocks(self, head: Expr, first: Expr) -> BlockAttention:
        """Return what computes many queries at once."""

        def place(row: Expr, share: Expr) -> Expr:
            return (row * self.step.heads + head * self.sharing + share) * self.width

        def turn(row: Expr, share: Expr, target: Any) -> None:
            self.rotate(self.query, place(row, share), target, 0, first + row, self.width**-0.5)

        return BlockAttention(
            sharing=self.sharing,
            length=self.length,
            capacity=self.capacity,
            width=self.width,
            window=self.step.window,
            keys=self.keys,
            values=self.values,
            turn=turn,
            output=self.output,
            place=place,
        )

    def append(self, head: Expr, row: Expr, position: Expr) -> None:
        """Write one row of keys, rotated, and one of values."""
        source = (row * self.step.key_heads + head) * self.width
        target = (head * self.capacity + position) * self.width
        self.rotate(self.key, source, self.keys, target, position, 1.0)
        for at, lanes in pieces(self.width, LANES):
            store(self.values, load(self.value, [source + at], lanes), [target + at], lanes)

    def rotate(self, source: Any, at: Expr, target: Any, to: Expr, position: Expr, scale: float) -> None:
        """Write a head with its halves rotated by a position's angles, times a number."""
        half = self.width // 2
        # Behind the table are only rows that have no place in the cache.
        angle = T.min(position, self.capacity - 1) * half
        cos_table, sin_table = (T.decl_buffer((prod(t.shape),), "float32", data=t.data) for t in self.tables)
        for k, lanes in pieces(half, LANES):
            first, second = (keep(load(source, [at + k + part], lanes)) for part in (0, half))
            cos, sin = (keep(load(t, [angle + k], lanes)) for t in (cos_table, sin_table))
            factor = number(scale, lanes)
            store(target, (first * cos - second * sin) * factor, [to + k], lanes)
            store(target, (second * cos + first * sin) * factor, [to + half + k], lanes)

    def attend(self, head: Expr, row: Expr, position: Expr, scratch: tuple[Any, Any, Any]) -> None:
        """Compute the queries of one row that share a head of keys."""
        turned, scores, seen = scratch
        base = (row * self.step.heads + head * self.sharing) * self.width
        for k in range(self.sharing):
            at = k * self.width
            self.rotate(self.query, base + at, turned, at, position, self.width**-0.5)
        keys = keep((head * self.capacity + load(seen, [1])) * self.width)
        with T.serial(load(seen, [0])) as j:
            self.score(turned, scores, keys + j * self.width, j)
        inverse = allocate((self.sharing,), "float32")
        for k in range(self.sharing):
            self.softmax(scores, k * self.padded, seen, inverse, k)
        for parts in _groups(list(pieces(self.width, LANES)), max(1, ACCUMULATORS // self.sharing)):
            self.mix(scores, seen, inverse, keys, base, parts)

    def score(self, turned: Any, scores: Any, at: Expr, j: Expr) -> None:
        """Multiply one row of keys with the queries; what is loaded serves all of them."""
        parts = list(pieces(self.width, LANES))
        row = [keep(load(self.keys, [at + offset], lanes)) for offset, lanes in parts]
        for k in range(self.sharing):
            sums: dict[int, Expr] = {}
            for (offset, lanes), values in zip(parts, row, strict=True):
                query = load(turned, [k * self.width + offset], lanes)
                known = sums.get(lanes)
                sums[lanes] = query * values if known is None else multiply_add(query, values, known, lanes)
            total = sum(across(value, lanes, lambda a, b: a + b) for lanes, value in sums.items())
            store(scores, total, [k * self.padded + j])

    def softmax(self, scores: Any, at: int, seen: Any, inverse: Any, k: int) -> None:
        """Turn scores into weights, and keep the reciprocal of their sum; a last vector is filled up with zeros."""
        count, lanes = load(seen, [0]), LANES
        blocks = allocate((1,), "int32")
        store(blocks, (count + (lanes - 1)) // lanes, [0])
        with T.serial(load(blocks, [0]) * lanes - count) as rest:
            store(scores, T.float32(LOWEST), [at + count + rest])
        state = allocate((2 * lanes,), "float32")
        store(state, number(LOWEST, lanes), [0], lanes)
        store(state, number(0.0, lanes), [lanes], lanes)
        with T.serial(load(blocks, [0])) as block:
            found = load(scores, [at + block * lanes], lanes)
            store(state, T.max(load(state, [0], lanes), found), [0], lanes)
        largest = allocate((1,), "float32")
        store(largest, across(load(state, [0], lanes), lanes, T.max), [0])
        with T.serial(load(blocks, [0])) as block:
            index = at + block * lanes
            weight = exp(load(scores, [index], lanes) - splat(load(largest, [0]), lanes), lanes)
            store(scores, weight, [index], lanes)
            store(state, load(state, [lanes], lanes) + load(scores, [index], lanes), [lanes], lanes)
        total = across(load(state, [lanes], lanes), lanes, lambda a, b: a + b)
        store(inverse, T.float32(1.0) / total, [k])

    def mix(
        self, scores: Any, seen: Any, inverse: Any, keys: Expr, base: Expr, parts: Sequence[tuple[int, int]]
    ) -> None:
        """Add up values by their weights, some columns of a head at a time."""
        sums = allocate((self.sharing, len(parts), LANES), "float32", "local")
        for k in range(self.sharing):
            for n, (_, lanes) in enumerate(parts):
                store(sums, number(0.0, lanes), [k, n, 0], lanes)
        with T.serial(load(seen, [0])) as j:
            for n, (offset, lanes) in enumerate(parts):
                values = keep(load(self.values, [keys + j * self.width + offset], lanes))
                for k in range(self.sharing):
                    weight = splat(load(scores, [k * self.padded + j]), lanes)
                    total = multiply_add(weight, values, load(sums, [k, n, 0], lanes), lanes)
                    store(sums, total, [k, n, 0], lanes)
        for k in range(self.sharing):
            for n, (offset, lanes) in enumerate(parts):
                result = load(sums, [k, n, 0], lanes) * splat(load(inverse, [k]), lanes)
                store(self.output, result, [base + k * self.width + offset], lanes)


def _groups(parts: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    return [parts[k : k + size] for k in range(0, len(parts), size)]
