"""Attention of many queries at once: a vector holds one element of sixteen queries, so nothing is summed across it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.float.functions import exp
from bitwright.compiler.lower.float.vectors import keep, multiply_add, number
from bitwright.compiler.lower.templates.scaffold import allocate, load, loop, splat, store

Expr = Any
# Queries of a block.
QUERIES = 16
# Keys, or columns of values, that are carried through a loop at once: with their sums they fit 32 registers of NEON.
TILE = 6
LOWEST = -3.0e38

# Writes a query, rotated and scaled, into a buffer: (row, which of those that share the keys, buffer).
Turn = Callable[[Expr, Expr, Any], None]


@dataclass
class BlockAttention:
    """Writes the loops of one head of keys.

    Attributes:
        sharing: Queries of a row that share the head.
        length: Rows.
        capacity: Rows of a cache.
        width: Elements of a head.
        window: Positions that a query sees, its own included; None for all.
        keys, values: The caches, flat.
        turn: Writes a query into a buffer of ``width`` elements.
        output: Flat.
        place: Returns where the result of a query begins in the output.
    """

    sharing: int
    length: int
    capacity: int
    width: int
    window: int | None
    keys: Any
    values: Any
    turn: Turn
    output: Any
    place: Callable[[Expr, Expr], Expr]

    def __post_init__(self) -> None:
        self.count = self.sharing * self.length
        self.tiles = -(-self.capacity // TILE)

    def emit(self, base: Expr, first: Expr) -> None:
        """Compute all queries.

        Args:
            base: Where the head's rows begin in the caches.
            first: Position of the first row.
        """
        queries = allocate((self.width * QUERIES,), "float32")
        scores = allocate((self.tiles * TILE * QUERIES,), "float32")
        one = allocate((self.width,), "float32")
        bounds = allocate((QUERIES,), "int32")
        state = allocate((3 * QUERIES,), "float32")
        seen = allocate((3,), "int32")
        with loop(-(-self.count // QUERIES)) as block:
            self.gather(block, first, (queries, one, bounds, seen))
            self.score(base, queries, scores, bounds, seen)
            self.softmax(scores, state, seen)
            self.mix(base, queries, scores, state, seen)
            self.scatter(block, queries)

    def query(self, block: Expr, lane: Expr) -> tuple[Expr, Expr]:
        """Return row and share of a query; the last block repeats the last query."""
        number_of = T.min(block * QUERIES + lane, self.count - 1)
        return number_of // self.sharing, number_of % self.sharing

    def gather(self, block: Expr, first: Expr, scratch: tuple[Any, Any, Any, Any]) -> None:
        """Lay the queries of a block side by side, and note how many positions each of them sees."""
        queries, one, bounds, seen = scratch
        with loop(QUERIES) as lane:
            row, share = self.query(block, lane)
            self.turn(row, share, one)
            with loop(self.width) as k:
                store(queries, load(one, [k]), [k * QUERIES + lane])
            store(bounds, T.min(first + row + 1, self.capacity), [lane])
        store(seen, load(bounds, [QUERIES - 1]), [0])
        store(seen, (load(seen, [0]) + (TILE - 1)) // TILE, [1])
        # The first query of a block sees furthest back; whole tiles before are left out.
        store(seen, 0 if self.window is None else T.max(load(bounds, [0]) - self.window, 0) // TILE, [2])

    def score(self, base: Expr, queries: Any, scores: Any, bounds: Any, seen: Any) -> None:
        """Multiply queries with keys, some keys at a time; what a query does not see is hidden."""
        sums = allocate((TILE, QUERIES), "float32", "local")
        with T.serial(load(seen, [1]) - load(seen, [2])) as number_of:
            tile = keep(load(seen, [2]) + number_of)
            # Behind the last row another one is read again, and hidden.
            rows = [keep(base + T.min(tile * TILE + u, self.capacity - 1) * self.width) for u in range(TILE)]
            for u in range(TILE):
                store(sums, number(0.0, QUERIES), [u, 0], QUERIES)
            with loop(self.width) as k:
                query = keep(load(queries, [k * QUERIES], QUERIES))
                for u in range(TILE):
                    key = splat(load(self.keys, [rows[u] + k]), QUERIES)
                    total = multiply_add(key, query, load(sums, [u, 0], QUERIES), QUERIES)
                    store(sums, total, [u, 0], QUERIES)
            for u in range(TILE):
                position = splat(tile * TILE + u, QUERIES)
                end = load(bounds, [0], QUERIES)
                visible = position < end
                if self.window is not None:
                    visible = tirx.And(visible, position >= end - splat(self.window, QUERIES))
                shown = tirx.Select(visible, load(sums, [u, 0], QUERIES), number(LOWEST, QUERIES))
                store(scores, shown, [(tile * TILE + u) * QUERIES], QUERIES)

    def softmax(self, scores: Any, state: Any, seen: Any) -> None:
        """Turn scores into weights; ``state`` keeps the largest, the sums and their reciprocals."""
        store(state, number(LOWEST, QUERIES), [0], QUERIES)
        store(state, number(0.0, QUERIES), [QUERIES], QUERIES)
        begin = keep(load(seen, [2]) * TILE)
        with T.serial(load(seen, [0]) - begin) as after:
            j = begin + after
            largest = T.max(load(state, [0], QUERIES), load(scores, [j * QUERIES], QUERIES))
            store(state, largest, [0], QUERIES)
        with T.serial(load(seen, [0]) - begin) as after:
            j = begin + after
            weight = exp(load(scores, [j * QUERIES], QUERIES) - load(state, [0], QUERIES), QUERIES)
            store(scores, weight, [j * QUERIES], QUERIES)
            total = load(state, [QUERIES], QUERIES) + load(scores, [j * QUERIES], QUERIES)
            store(state, total, [QUERIES], QUERIES)
        store(state, number(1.0, QUERIES) / load(state, [QUERIES], QUERIES), [2 * QUERIES], QUERIES)

    def mix(self, base: Expr, mixed: Any, scores: Any, state: Any, seen: Any) -> None:
        """Add up values by their weights into the place of the queries, some columns at a time."""
        begin = keep(load(seen, [2]) * TILE)
        for start in range(0, self.width, TILE):
            columns = range(start, min(start + TILE, self.width))
            sums = allocate((len(columns), QUERIES), "float32", "local")
            for n in range(len(columns)):
                store(sums, number(0.0, QUERIES), [n, 0], QUERIES)
            with T.serial(load(seen, [0]) - begin) as after:
                j = begin + after
                weight = keep(load(scores, [j * QUERIES], QUERIES))
                for n, column in enumerate(columns):
                    value = splat(load(self.values, [base + j * self.width + column]), QUERIES)
                    total = multiply_add(value, weight, load(sums, [n, 0], QUERIES), QUERIES)
                    store(sums, total, [n, 0], QUERIES)
            for n, column in enumerate(columns):
                result = load(sums, [n, 0], QUERIES) * load(state, [2 * QUERIES], QUERIES)
                store(mixed, result, [column * QUERIES], QUERIES)

    def scatter(self, block: Expr, mixed: Any) -> None:
        """Write the results of a block to their rows."""
        with loop(QUERIES) as lane:
            row, share = self.query(block, lane)
            at = keep(self.place(row, share))
            with loop(self.width) as k:
                store(self.output, load(mixed, [k * QUERIES + lane]), [at + k])
