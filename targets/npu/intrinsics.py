"""What the accelerator's commands compute, as TensorIR, and the calls that give them: the tensor intrinsics.

Addresses are still pointers here; ``onchip`` turns those into words of the buffers. Access pointers of the host's
memory stay pointers.
"""
# TVM's decorators have no types.
# mypy: allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812

from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.workload import Output, requantized

ACTIVATIONS, WEIGHTS, SUMS = "local.npu_activations", "local.npu_weights", "local.npu_sums"
SCOPES = (ACTIVATIONS, WEIGHTS, SUMS)
Order = Callable[[Any, Any], tuple[Any, Any]]


def _registered(name: str, description: Any, implementation: Any) -> str:
    TensorIntrin.register(name, description, implementation, override=True)
    return name


def _in_order(row: Any, column: Any) -> tuple[Any, Any]:
    return row, column


def _swapped(row: Any, column: Any) -> tuple[Any, Any]:
    return column, row


def load_activations(machine: Machine, words: int) -> str:
    """Register the load of words of activations; return its name."""
    # Weight stationary: a word is several indices of depth of one pixel. Output stationary: one index of depth of
    # several pixels, so words lie across the rows they are read from.
    rows, order = machine.rows, _in_order if machine.weight_stationary else _swapped
    height, width = order(words, rows)

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (height, width), "int8", offset_factor=1, strides=[T.int32(), 1])
        B = T.match_buffer(b, (words, rows), "int8", offset_factor=1, strides=[rows, 1], scope=ACTIVATIONS)
        with T.sblock("root"):
            T.reads(A[0:height, 0:width])
            T.writes(B[0:words, 0:rows])
            T.evaluate(
                T.call_extern(
                    "int32",
                    "npu_load_activations",
                    A.access_ptr("r"),
                    *order(A.strides[0], 1),
                    B.access_ptr("w"),
                    words,
                )
            )

    name = f"npu.load_activations.{machine.dataflow}.{rows}.{words}"
    return _registered(name, _copied(words, rows, ACTIVATIONS, order), implementation)


def load_weights(machine: Machine, words: int) -> str:
    """Register the load of words of weights; return its name."""
    columns = machine.columns

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (words, columns), "int8", offset_factor=1, strides=[columns, 1])
        B = T.match_buffer(b, (words, columns), "int8", offset_factor=1, strides=[columns, 1], scope=WEIGHTS)
        with T.sblock("root"):
            T.reads(A[0:words, 0:columns])
            T.writes(B[0:words, 0:columns])
            T.evaluate(
                T.call_extern("int32", "npu_load_weights", A.access_ptr("r"), B.access_ptr("w"), words)
            )

    name = f"npu.load_weights.{columns}.{words}"
    return _registered(name, _copied(words, columns, WEIGHTS, _in_order), implementation)


def _copied(words: int, lanes: int, scope: str, order: Order) -> Any:
    """Return the description of a load: words of so many lanes, from a matrix with the indices in that order."""
    height, width = order(words, lanes)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (height, width), "int8", offset_factor=1)
        B = T.match_buffer(b, (words, lanes), "int8", offset_factor=1, scope=scope)
        with T.sblock("root"):
            T.reads(A[0:height, 0:width])
            T.writes(B[0:words, 0:lanes])
            for k, i in T.grid(words, lanes):
                with T.sblock("word"):
                    vk, vi = T.axis.remap("SS", [k, i])
                    B[vk, vi] = A[order(vk, vi)]

    return description


def clear(machine: Machine, rows: int) -> str:
    """Register the clearing of rows of sums; return its name."""
    columns = machine.columns

    @T.prim_func(s_tir=True)
    def description(c: T.handle) -> None:
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, scope=SUMS)
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("row"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = 0

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle) -> None:
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, strides=[columns, 1], scope=SUMS)
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:rows, 0:columns])
            T.evaluate(T.call_extern("int32", "npu_clear", C.access_ptr("w"), rows))

    return _registered(f"npu.clear.{columns}.{rows}", description, implementation)


def tile(machine: Machine, words: int) -> str:
    """Register a tile of so many words of activations; return its name."""
    # Weight stationary: each word is a row of sums, and the reduction is over its lanes. Output stationary: each
    # word is one step of the reduction, and its lanes are the rows.
    rows, columns, order = machine.rows, machine.columns, _in_order if machine.weight_stationary else _swapped
    outputs, depth = order(words, rows)

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (words, rows), "int8", offset_factor=1, scope=ACTIVATIONS)
        B = T.match_buffer(b, (depth, columns), "int8", offset_factor=1, scope=WEIGHTS)
        C = T.match_buffer(c, (outputs, columns), "int32", offset_factor=1, scope=SUMS)
        with T.sblock("root"):
            T.reads(C[0:outputs, 0:columns], A[0:words, 0:rows], B[0:depth, 0:columns])
            T.writes(C[0:outputs, 0:columns])
            for i, j, k in T.grid(outputs, columns, depth):
                with T.sblock("step"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    C[vi, vj] = C[vi, vj] + T.cast(A[order(vi, vk)], "int32") * T.cast(B[vk, vj], "int32")

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (words, rows), "int8", offset_factor=1, strides=[rows, 1], scope=ACTIVATIONS)
        B = T.match_buffer(b, (depth, columns), "int8", offset_factor=1, strides=[columns, 1], scope=WEIGHTS)
        C = T.match_buffer(c, (outputs, columns), "int32", offset_factor=1, strides=[columns, 1], scope=SUMS)
        with T.sblock("root"):
            T.reads(C[0:outputs, 0:columns], A[0:words, 0:rows], B[0:depth, 0:columns])
            T.writes(C[0:outputs, 0:columns])
            T.evaluate(
                T.call_extern(
                    "int32",
                    "npu_tile",
                    A.access_ptr("r"),
                    B.access_ptr("r"),
                    C.access_ptr("rw"),
                    words,
                )
            )

    name = f"npu.tile.{machine.dataflow}.{rows}.{columns}.{words}"
    return _registered(name, description, implementation)


def store(machine: Machine, rows: int, output: Output) -> str:
    """Register the requantization of so many rows of sums; return its name."""
    columns, zero_point, lower, upper = machine.columns, output.zero_point, output.lower, output.upper

    @T.prim_func(s_tir=True)
    def description(c: T.handle, p: T.handle, y: T.handle) -> None:
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, scope=SUMS)
        P = T.match_buffer(p, (3, columns), "int32", offset_factor=1)
        Y = T.match_buffer(y, (rows, columns), "int8", offset_factor=1)
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns], P[0:3, 0:columns])
            T.writes(Y[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("element"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    Y[vi, vj] = requantized(C[vi, vj], [P[0, vj], P[1, vj], P[2, vj]], output)

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle, p: T.handle, y: T.handle) -> None:
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, strides=[columns, 1], scope=SUMS)
        P = T.match_buffer(p, (3, columns), "int32", offset_factor=1, strides=[columns, 1])
        Y = T.match_buffer(y, (rows, columns), "int8", offset_factor=1, strides=[T.int32(), 1])
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns], P[0:3, 0:columns])
            T.writes(Y[0:rows, 0:columns])
            T.evaluate(
                T.call_extern(
                    "int32",
                    "npu_store",
                    Y.access_ptr("w"),
                    Y.strides[0],
                    C.access_ptr("r"),
                    rows,
                    P.access_ptr("r"),
                    zero_point,
                    lower,
                    upper,
                )
            )

    return _registered(
        f"npu.store.{columns}.{rows}.{zero_point}.{lower}.{upper}", description, implementation
    )
