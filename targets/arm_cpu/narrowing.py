"""Sums to bytes on NEON: one conversion that rounds half to even, then narrowing instructions that saturate."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import Narrowing
from bitwright.compiler.lower.templates.scaffold import Expr, shuffle, splat

LANES = 4
TO_BYTES = {"int8": "sqxtn", "uint8": "sqxtun"}


def _neon(name: str, dtype: str, *operands: Expr) -> Expr:
    return T.call_llvm_pure_intrin(f"llvm.aarch64.neon.{name}", *operands, dtype=dtype)


def _emit(reals: list[Expr], dtype: str, zero_point: int) -> Expr:
    words = [_neon("sqxtn", "int16x4", _neon("fcvtns", "int32x4", real)) for real in reals]

    def half(first: Expr, second: Expr) -> Expr:
        both = shuffle([first, second], range(2 * LANES))
        moved = _neon("sqadd", "int16x8", both, splat(T.int16(zero_point), 8)) if zero_point else both
        return _neon(TO_BYTES[dtype], "int8x8", moved)

    packed = shuffle([half(*words[:2]), half(*words[2:])], range(4 * LANES))
    return packed if dtype == "int8" else T.reinterpret(packed, dtype=f"{dtype}x{4 * LANES}")


NEON_NARROWING = Narrowing(LANES, _emit)
