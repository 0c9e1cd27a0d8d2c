"""What the accelerator's commands compute, as TensorIR, and the calls that give them: the tensor intrinsics.

Addresses are still pointers here; ``onchip`` turns those into words of the buffers. Access pointers of the host's
memory stay pointers.
"""
# TVM's decorators have no types.
# mypy: allow-untyped-decorators

from __future__ import annotations

from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812

from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.workload import Output, requantized

ACTIVATIONS, WEIGHTS, SUMS = "local.npu_activations", "local.npu_weights", "local.npu_sums"
SCOPES = (ACTIVATIONS, WEIGHTS, SUMS)


def _registered(name: str, description: Any, implementation: Any) -> str:
    TensorIntrin.register(name, description, implementation, override=True)
    return name


def load_activations(machine: Machine, words: int) -> str:
    """Register the load of words of activations; return its name."""
    build = _load_pixels if machine.weight_stationary else _load_transposed
    name = f"npu.load_activations.{machine.dataflow}.{machine.rows}.{words}"
    return _registered(name, *build(machine.rows, words))


def _load_transposed(rows: int, words: int) -> tuple[Any, Any]:
    """Output stationary: a word is one index of depth of several pixels."""

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (rows, words), "int8", offset_factor=1)
        B = T.match_buffer(b, (words, rows), "int8", offset_factor=1, scope=ACTIVATIONS)
        with T.sblock("root"):
            T.reads(A[0:rows, 0:words])
            T.writes(B[0:words, 0:rows])
            for k, i in T.grid(words, rows):
                with T.sblock("word"):
                    vk, vi = T.axis.remap("SS", [k, i])
                    B[vk, vi] = A[vi, vk]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (rows, words), "int8", offset_factor=1, strides=[T.int32(), 1])
        B = T.match_buffer(b, (words, rows), "int8", offset_factor=1, strides=[rows, 1], scope=ACTIVATIONS)
        with T.sblock("root"):
            T.reads(A[0:rows, 0:words])
            T.writes(B[0:words, 0:rows])
            T.evaluate(
                T.call_extern(
                    "int32",
                    "npu_load_activations",
                    A.access_ptr("r"),
                    1,
                    A.strides[0],
                    B.access_ptr("w"),
                    words,
                )
            )

    return description, implementation


def _load_pixels(rows: int, words: int) -> tuple[Any, Any]:
    """Weight stationary: a word is several indices of depth of one pixel."""

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (words, rows), "int8", offset_factor=1)
        B = T.match_buffer(b, (words, rows), "int8", offset_factor=1, scope=ACTIVATIONS)
        with T.sblock("root"):
            T.reads(A[0:words, 0:rows])
            T.writes(B[0:words, 0:rows])
            for p, i in T.grid(words, rows):
                with T.sblock("word"):
                    vp, vi = T.axis.remap("SS", [p, i])
                    B[vp, vi] = A[vp, vi]

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (words, rows), "int8", offset_factor=1, strides=[T.int32(), 1])
        B = T.match_buffer(b, (words, rows), "int8", offset_factor=1, strides=[rows, 1], scope=ACTIVATIONS)
        with T.sblock("root"):
            T.reads(A[0:words, 0:rows])
            T.writes(B[0:words, 0:rows])
            T.evaluate(
                T.call_extern(
                    "int32",
                    "npu_load_activations",
                    A.access_ptr("r"),
                    A.strides[0],
                    1,
                    B.access_ptr("w"),
                    words,
                )
            )

    return description, implementation


def load_weights(machine: Machine, words: int) -> str:
    """Register the load of words of weights; return its name."""
    columns = machine.columns

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle) -> None:
        A = T.match_buffer(a, (words, columns), "int8", offset_factor=1)
        B = T.match_buffer(b, (words, columns), "int8", offset_factor=1, scope=WEIGHTS)
        with T.sblock("root"):
            T.reads(A[0:words, 0:columns])
            T.writes(B[0:words, 0:columns])
            for k, j in T.grid(words, columns):
                with T.sblock("word"):
                    vk, vj = T.axis.remap("SS", [k, j])
                    B[vk, vj] = A[vk, vj]

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

    return _registered(f"npu.load_weights.{columns}.{words}", description, implementation)


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
    # In both dataflows: sums [rows, columns], activations by words; the reduction is over words or over lanes.
    build = _tile_weight_stationary if machine.weight_stationary else _tile_output_stationary
    name = f"npu.tile.{machine.dataflow}.{machine.rows}.{machine.columns}.{words}"
    return _registered(name, *build(machine.rows, machine.columns, words))


def _tile_output_stationary(rows: int, columns: int, words: int) -> tuple[Any, Any]:
    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (words, rows), "int8", offset_factor=1, scope=ACTIVATIONS)
        B = T.match_buffer(b, (words, columns), "int8", offset_factor=1, scope=WEIGHTS)
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, scope=SUMS)
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns], A[0:words, 0:rows], B[0:words, 0:columns])
            T.writes(C[0:rows, 0:columns])
            for i, j, k in T.grid(rows, columns, words):
                with T.sblock("step"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    C[vi, vj] = C[vi, vj] + T.cast(A[vk, vi], "int32") * T.cast(B[vk, vj], "int32")

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (words, rows), "int8", offset_factor=1, strides=[rows, 1], scope=ACTIVATIONS)
        B = T.match_buffer(b, (words, columns), "int8", offset_factor=1, strides=[columns, 1], scope=WEIGHTS)
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, strides=[columns, 1], scope=SUMS)
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns], A[0:words, 0:rows], B[0:words, 0:columns])
            T.writes(C[0:rows, 0:columns])
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

    return description, implementation


def _tile_weight_stationary(rows: int, columns: int, words: int) -> tuple[Any, Any]:
    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (words, rows), "int8", offset_factor=1, scope=ACTIVATIONS)
        B = T.match_buffer(b, (rows, columns), "int8", offset_factor=1, scope=WEIGHTS)
        C = T.match_buffer(c, (words, columns), "int32", offset_factor=1, scope=SUMS)
        with T.sblock("root"):
            T.reads(C[0:words, 0:columns], A[0:words, 0:rows], B[0:rows, 0:columns])
            T.writes(C[0:words, 0:columns])
            for p, j, i in T.grid(words, columns, rows):
                with T.sblock("step"):
                    vp, vj, vi = T.axis.remap("SSR", [p, j, i])
                    C[vp, vj] = C[vp, vj] + T.cast(A[vp, vi], "int32") * T.cast(B[vi, vj], "int32")

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (words, rows), "int8", offset_factor=1, strides=[rows, 1], scope=ACTIVATIONS)
        B = T.match_buffer(b, (rows, columns), "int8", offset_factor=1, strides=[columns, 1], scope=WEIGHTS)
        C = T.match_buffer(c, (words, columns), "int32", offset_factor=1, strides=[columns, 1], scope=SUMS)
        with T.sblock("root"):
            T.reads(C[0:words, 0:columns], A[0:words, 0:rows], B[0:rows, 0:columns])
            T.writes(C[0:words, 0:columns])
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

    return description, implementation


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
