"""Kernels for any number of elements, made of kernels for fixed numbers.

An element is what one index of the outermost dimension holds: a row, an image, a text. In memory elements lie one
behind the other, so a kernel written for R elements computes any R neighbours when it is given their addresses. Bodies
for several R share the work: full blocks of the largest, then of smaller ones. A block may begin inside the one before
it where that saves time; the elements in both are computed twice, with equal results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx

from bitwright.compiler.lower.kernels.loops import OPAQUE
from bitwright.compiler.lower.planned_memory import statements_of

# As everywhere: what starting and joining threads costs is worth it from here on.
PARALLEL_MIN_ELEMENTS = 8192


@dataclass(frozen=True)
class Body:
    """A kernel for a fixed number of elements.

    Attributes:
        elements: How many.
        function: Scheduled function; its buffers of the batch hold ``elements`` of them.
        places: Position among the parameters of the whole kernel, for each parameter of ``function``.
    """

    elements: int
    function: tirx.PrimFunc
    places: tuple[int, ...]


def any_number(bodies: Sequence[Body], batched: frozenset[int], work: int) -> tirx.PrimFunc:
    """Return a function for any number of elements.

    Args:
        bodies: For falling numbers of elements, the last for one. All write the same output, their last parameter.
        batched: Positions, among the parameters of the whole kernel, of buffers that hold elements: the output and
            some of the inputs. Their first dimension counts elements, or several rows for each.
        work: What one element costs, in values written: decides whether a loop is worth starting threads.
    """
    assert bodies[-1].elements == 1
    parameters = _parameters(bodies, batched)
    one = bodies[-1]
    rows = {
        place: int(buffer.ty.shape[0])
        for place, buffer in zip(one.places, one.function.params, strict=True)
        if place in batched
    }
    first = min(batched)
    count = tirx.Var("elements", "int64")
    statements: list[Any] = [
        tirx.Bind(count, tirx.floordiv(parameters[first].ty.shape[0], _int64(rows[first])))
    ]
    done: Any = _int64(0)
    for number, body in enumerate(bodies):
        last = number + 1 == len(bodies)
        blocks = tirx.Var(f"blocks_of_{body.elements}", "int64")
        statements.append(tirx.Bind(blocks, _blocks(count, done, body.elements, last)))
        statements += _loop(body, parameters, rows, _Span(count, done, blocks), work)
        after = tirx.Var(f"after_{body.elements}", "int64")
        statements.append(tirx.Bind(after, done + blocks * body.elements))
        done = after
    root = s_tir.SBlock([], [], [], "root", tirx.SeqStmt(statements))
    whole = s_tir.SBlockRealize([], tirx.const(True, "bool"), root)
    function = tirx.PrimFunc(list(parameters.values()), whole, one.function.ret_type, one.function.attrs)
    return function.with_attr("op_pattern", OPAQUE)


@dataclass(frozen=True)
class _Span:
    """What one body computes: ``blocks`` blocks from element ``start`` on, of ``count`` elements in all."""

    count: Any
    start: Any
    blocks: Any


def _int64(value: int) -> Any:
    return tirx.const(value, "int64")


def _parameters(bodies: Sequence[Body], batched: frozenset[int]) -> dict[int, Any]:
    """Return the buffers of the whole kernel by position; those of the batch have a first dimension of any size."""
    found: dict[int, Any] = {}
    for body in reversed(bodies):
        for place, buffer in zip(body.places, body.function.params, strict=True):
            if place not in found:
                found[place] = _parameter(buffer, place, batched=place in batched)
    return dict(sorted(found.items()))


def _parameter(buffer: Any, place: int, *, batched: bool) -> Any:
    sizes: list[Any] = [_int64(int(size)) for size in buffer.ty.shape]
    if batched:
        sizes[0] = tirx.Var(f"rows_{place}", "int64")
    return tirx.decl_buffer(sizes, str(buffer.ty.dtype), name=f"p{place}")


def _blocks(count: Any, start: Any, elements: int, last: bool) -> Any:
    """Return how many blocks a body computes: the whole ones, and one more if it is more than half full."""
    left = count - start
    if last:
        return tirx.floordiv(left, _int64(elements))
    rounded = tirx.floordiv(left + (elements - 1) // 2, _int64(elements))
    return tirx.Select(count >= elements, rounded, _int64(0))


def _loop(
    body: Body, parameters: Mapping[int, Any], rows: Mapping[int, int], span: _Span, work: int
) -> list[Any]:
    """Return the loop over a body's blocks: by threads if there is enough to do and the body starts none itself."""
    serial = _blocks_loop(body, parameters, rows, span, tirx.ForKind.SERIAL)
    if _starts_threads(body.function):
        return [serial]
    again = Body(body.elements, s_tir.renew_defs(body.function), body.places)
    threads = _blocks_loop(again, parameters, rows, span, tirx.ForKind.PARALLEL)
    least = -(-PARALLEL_MIN_ELEMENTS // max(1, work * body.elements))
    return [tirx.IfThenElse(span.blocks >= max(2, least), threads, serial)]


def _blocks_loop(
    body: Body, parameters: Mapping[int, Any], rows: Mapping[int, int], span: _Span, kind: Any
) -> Any:
    block = tirx.Var("block", "int64")
    at = span.start + block * body.elements
    # The last block may begin inside the one before it. Both write the same bytes there, in any order.
    fits = at + body.elements <= span.count
    first = tirx.Var("first", "int64")
    statements: list[Any] = [tirx.Bind(first, tirx.Select(fits, at, span.count - body.elements))]
    for place, own in zip(body.places, body.function.params, strict=True):
        whole = parameters[place]
        index = [_int64(0)] * len(whole.ty.shape)
        if place in rows:
            index[0] = first * rows[place]
        statements.append(tirx.DeclBuffer(own, data=tirx.address_of(tirx.BufferLoad(whole, index))))
    statements.append(_inside(body.function.body.block))
    return tirx.For(block, _int64(0), span.blocks, kind, tirx.SeqStmt(statements))


def _inside(root: Any) -> Any:
    """Return what a function's root block does; scratch buffers of it become those of every turn of the loop."""
    if not root.alloc_buffers:
        return root.body
    block = s_tir.SBlock([], [], [], "one_block", root.body, alloc_buffers=root.alloc_buffers)
    return s_tir.SBlockRealize([], tirx.const(True, "bool"), block)


def _starts_threads(function: tirx.PrimFunc) -> bool:
    statements = statements_of(function.body)
    return any(isinstance(s, tirx.For) and int(s.kind) == tirx.ForKind.PARALLEL for s in statements)
