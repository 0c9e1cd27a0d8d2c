"""Small building blocks for writing TensorIR with the IR builder: functions, flat views, vectors, spans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.root_block import with_root_block

Expr = Any
Buffer = Any

COPY_WIDTH = 64
# Below this TVM puts a buffer on the stack if its scope is "global". Of the scope "local" every buffer comes from the
# runtime, by calls of hundreds of instructions whenever the loop around it comes by, used or not.
STACK_BYTES = 1024
# Starting and joining threads costs microseconds: about what a million multiply-accumulates cost on one core.
MIN_PARALLEL_MACS = 1 << 20
# Enough pieces that threads of unequal speed finish together, few enough that each keeps its weights cached.
PARALLEL_PIECES = 16


@dataclass(frozen=True)
class Parameter:
    """One buffer parameter of a function: its name, physical shape and element type."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def build_function(parameters: Sequence[Parameter], emit: Callable[[list[Buffer]], None]) -> tirx.PrimFunc:
    """Build a scheduled function.

    Args:
        parameters: Buffers in the order of the call.
        emit: Called with a one-dimensional view of every parameter; writes the body. Flat views keep all
            index arithmetic in one place, whatever the rank of the tensor.

    Returns:
        A private ``s_tir`` function around a root block.
    """
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        arguments = [T.arg(p.name, T.buffer(p.shape, p.dtype, layout=None)) for p in parameters]
        emit([_flat_view(a, p) for a, p in zip(arguments, parameters, strict=True)])
    return with_root_block(builder.get())


def _flat_view(buffer: Buffer, parameter: Parameter) -> Buffer:
    return T.decl_buffer((prod(parameter.shape),), parameter.dtype, data=buffer.data, layout=None)


def allocate(shape: tuple[int, ...], dtype: str, scope: str = "global") -> Buffer:
    """Allocate a scratch buffer; scope "local" is for what LLVM is to promote to registers."""
    if scope == "local" and prod(shape) * np.dtype(dtype).itemsize < STACK_BYTES:
        scope = "global"
    return T.alloc_buffer(shape, dtype, scope=scope, layout=None)


def allocate_addressed(length: int, dtype: str) -> Buffer:
    """Allocate a flat scratch buffer whose elements are also reached through their address.

    TensorIR shrinks allocations to the elements it sees accessed, and behind an address it sees only one; the
    stores to both ends keep the whole length.
    """
    buffer = allocate((length,), dtype)
    for end in (0, length - 1):
        store(buffer, T.cast(0, dtype), [end])
    return buffer


def vector_type(dtype: str, lanes: int) -> str:
    """Return TensorIR's name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat(value: Expr, lanes: int) -> Expr:
    """Repeat a scalar in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def load(buffer: Buffer, indices: Sequence[Expr], lanes: int = 1) -> Expr:
    """Load ``lanes`` neighbouring elements along the last axis."""
    return buffer.vload(list(indices), dtype=vector_type(buffer.dtype, lanes))


def store(buffer: Buffer, value: Expr, indices: Sequence[Expr], lanes: int = 1) -> None:
    """Store ``lanes`` neighbouring elements along the last axis."""
    *outer, last = indices
    T.buffer_store(buffer, value, [*outer, last if lanes == 1 else tirx.Ramp(last, 1, lanes)])


def held(value: Expr, dtype: str, lanes: int) -> Expr:
    """Compute a vector once and return it for any number of uses; an expression is computed at each of them."""
    buffer = allocate((lanes,), dtype, "local")
    store(buffer, value, [0], lanes)
    return load(buffer, [0], lanes)


def shuffle(vector: Expr, lanes: Sequence[int]) -> Expr:
    """Return the given lanes of a vector, or of several vectors of one type put one behind the other."""
    vectors = vector if isinstance(vector, list) else [vector]
    return tirx.Shuffle(vectors, [tirx.const(lane, "int32") for lane in lanes])


def pieces(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Split ``length`` into (offset, lanes): full vectors of ``width``, then smaller powers of two."""
    offset = 0
    while offset < length:
        while width > length - offset:
            width //= 2
        yield offset, width
        offset += width


def loop(extent: int, *, parallel: bool = False) -> AbstractContextManager[Expr]:
    """Open a loop from 0 to ``extent``."""
    frame: AbstractContextManager[Expr] = T.parallel(extent) if parallel else T.serial(extent)
    return frame


def parallel_chunks(tiles: int, blocks: int) -> int:
    """Return into how many pieces ``tiles`` are split when ``blocks`` weight blocks are parallel as well."""
    return max(1, min(tiles, -(-PARALLEL_PIECES // blocks)))


@contextmanager
def share(length: int, parts: int, part: Expr) -> Iterator[Expr]:
    """Open a loop over one of ``parts`` nearly equal shares of ``length``.

    The extent is a number: TVM's simplifier draws wrong conclusions from nested loops whose bounds depend on
    quotients and remainders of other loops.
    """
    size = -(-length // parts)
    with loop(size) as i:
        index = part * size + i
        if size * parts == length:
            yield index
        else:
            with T.If(index < length), T.Then():
                yield index


def for_span(length: int, emit: Callable[[Expr, int], None], width: int = COPY_WIDTH) -> None:
    """Emit code for ``length`` elements: a loop over full vectors, then the rest in smaller pieces.

    Args:
        length: Number of elements, known now.
        emit: Called with (first element, lanes).
        width: Lanes of a full vector, a power of two.
    """
    full = length // width
    if full == 1:
        emit(0, width)
    elif full > 1:
        with loop(full) as block:
            emit(block * width, width)
    for offset, lanes in pieces(length - full * width, width):
        emit(full * width + offset, lanes)
