"""Elementwise kernels that also transpose, in registers: 16 x 16 elements at a time, whole vectors on both sides.

A change between row-major and channels-last order is a transposition of a matrix [R, S] of neighbouring axes. Blocks at
the ends move back over elements that are done, so no block is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.kernels.loops import View, parallel
from bitwright.compiler.lower.templates.scaffold import held, load, loop, shuffle, splat, store

Expr: TypeAlias = Any
BLOCK = 16
BLOCKS_READ = 8
MIN_ELEMENTS = 4096  # below that the code is not worth its size

Vector: TypeAlias = Callable[[Expr], Expr]


def matrix_of(source: View, output: View) -> tuple[int, int, int] | None:
    """Return (batch, R, S) if the step turns [batch, R, S] of memory into [batch, S, R], else None."""
    before, after = ([a for a in v.order if v.shape[a] != 1] for v in (source, output))
    if source.shape != output.shape or before == after:
        return None
    common = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
    before, after = before[common:], after[common:]
    split = before.index(after[0])
    if before[split:] + before[:split] != after:
        return None
    rows, columns = (math.prod(source.shape[a] for a in axes) for axes in (before[:split], before[split:]))
    return math.prod(source.shape) // (rows * columns), rows, columns


def transposes_in_registers(source: View, output: View) -> bool:
    """Tell whether ``map_transposed`` can write this step, and should."""
    found = matrix_of(source, output)
    sizes = tuple(_size(v.buffer.dtype) for v in (source, output))
    blocks = found is not None and min(found[1:]) >= BLOCK and math.prod(found) >= MIN_ELEMENTS
    return blocks and sizes in _EMITTERS


def map_transposed(source: View, output: View, value: Vector) -> None:
    """Write ``output[i] = value(source[i])`` where ``transposes_in_registers``.

    Args:
        source: Float32 or 8-bit integers.
        output: 8-bit integers or float32; not 8-bit if the source is.
        value: From 16 source elements (8-bit ones widened to int32) to 16 output elements (8-bit ones as int32).
    """
    found = matrix_of(source, output)
    assert found is not None
    batch, rows, columns = found
    sizes = _size(source.buffer.dtype), _size(output.buffer.dtype)
    emit, x, y = _EMITTERS[sizes], _flat(source), _flat(output)
    column_blocks, row_blocks = (-(-n // BLOCK) for n in (columns, rows))
    # Reading wide elements costs more than writing bytes: long stretches of few rows, instead of a line of many.
    together = min(column_blocks, BLOCKS_READ if sizes == (4, 1) else 1)
    chunks = -(-column_blocks // together)
    with parallel(batch * chunks, batch * rows * columns) as task:
        first = task // chunks * (rows * columns)
        with loop(row_blocks) as row_block, loop(together) as block:
            row = T.min(row_block * BLOCK, rows - BLOCK)
            column = T.min((task % chunks * together + block) * BLOCK, columns - BLOCK)
            emit(x, y, first + row * columns + column, columns, first + column * rows + row, rows, value)


def _size(dtype: str) -> int:
    return {"float32": 4, "int32": 4, "uint8": 1, "int8": 1}.get(str(dtype), 0)


def _flat(view: View) -> Any:
    length = math.prod(view.shape)
    return T.decl_buffer((length,), view.buffer.dtype, data=view.buffer.data, layout=None)


def _turned(four: Sequence[Expr], dtype: str) -> list[Expr]:
    """Transpose 4 x 4 words within each 128-bit lane of four vectors."""
    a, b, c, d = (held(T.reinterpret(v, dtype="int32x16"), "int32", BLOCK) for v in four)

    def pick(first: Expr, second: Expr, lanes: Sequence[int]) -> Expr:
        taken = shuffle([first, second], [4 * q + i % 4 + i // 4 * 16 for q in range(4) for i in lanes])
        return held(taken, "int32", BLOCK)

    # Indices 0..3 are words of the first vector's lane, 4..7 of the second's.
    low, high = (0, 4, 1, 5), (2, 6, 3, 7)
    ab, cd, ab_high, cd_high = (
        pick(*pair) for pair in ((a, b, low), (c, d, low), (a, b, high), (c, d, high))
    )
    ends = ((ab, cd, (0, 1, 4, 5)), (ab, cd, (2, 3, 6, 7)), (ab_high, cd_high, (0, 1, 4, 5)))
    found = [pick(*end) for end in (*ends, (ab_high, cd_high, (2, 3, 6, 7)))]
    return [T.reinterpret(v, dtype=f"{dtype}x16") for v in found]


def _words_to_bytes(x: Any, y: Any, at: Expr, stride: int, to: Expr, out_stride: int, value: Vector) -> None:
    def quad(first: int) -> Expr:
        parts = [held(value(load(x, [at + (first + i) * stride], BLOCK)), "int32", BLOCK) for i in range(4)]
        word = T.bitwise_and(parts[0], splat(T.int32(255), BLOCK))
        for i, part in enumerate(parts[1:3], 1):
            masked = T.bitwise_and(part, splat(T.int32(255), BLOCK))
            word = T.bitwise_or(word, T.shift_left(masked, splat(T.int32(8 * i), BLOCK)))
        return T.bitwise_or(word, T.shift_left(parts[3], splat(T.int32(24), BLOCK)))

    # Column 4 * lane + n of the block is lane ``lane`` of the n-th vector.
    for n, vector in enumerate(_turned([quad(4 * k) for k in range(4)], "int32")):
        for lane in range(4):
            four = shuffle(vector, range(4 * lane, 4 * lane + 4))
            taken = T.reinterpret(four, dtype=f"{y.dtype}x{BLOCK}")
            store(y, taken, [to + (4 * lane + n) * out_stride], BLOCK)


def _bytes_to_words(x: Any, y: Any, at: Expr, stride: int, to: Expr, out_stride: int, value: Vector) -> None:
    def rows(n: int) -> Expr:
        """Rows n, n + 4, n + 8 and n + 12, one in each lane."""
        parts = [load(x, [at + (n + 4 * lane) * stride], BLOCK) for lane in range(4)]
        return shuffle([T.reinterpret(p, dtype="int32x4") for p in parts], range(BLOCK))

    for k, words in enumerate(_turned([rows(n) for n in range(4)], "int32")):
        for j in range(4):
            up = T.shift_left(words, splat(T.int32(24 - 8 * j), BLOCK))
            store(y, value(_top_byte(up, str(x.dtype))), [to + (4 * k + j) * out_stride], BLOCK)


def _top_byte(words: Expr, dtype: str) -> Expr:
    if dtype == "int8":
        return T.shift_right(words, splat(T.int32(24), BLOCK))
    unsigned = T.shift_right(T.reinterpret(words, dtype="uint32x16"), splat(T.uint32(24), BLOCK))
    return T.reinterpret(unsigned, dtype="int32x16")


def _words_to_words(x: Any, y: Any, at: Expr, stride: int, to: Expr, out_stride: int, value: Vector) -> None:
    dtype = str(x.dtype)
    for k in range(4):

        def rows(n: int, quarter: int = k) -> Expr:
            parts = [load(x, [at + (n + 4 * lane) * stride + 4 * quarter], 4) for lane in range(4)]
            return shuffle(parts, range(BLOCK))

        for j, vector in enumerate(_turned([rows(n) for n in range(4)], dtype)):
            store(y, value(vector), [to + (4 * k + j) * out_stride], BLOCK)


_EMITTERS = {(4, 1): _words_to_bytes, (1, 4): _bytes_to_words, (4, 4): _words_to_words}
