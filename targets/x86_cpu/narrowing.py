"""Sums to bytes: the packing instructions saturate on the way, which saves the clamps, and take four vectors at once.

They work within 128-bit lanes; one permutation of 32-bit groups at the end puts the bytes in order.
"""

from __future__ import annotations

from functools import partial

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import Narrowing
from bitwright.compiler.lower.templates.scaffold import Expr, shuffle, splat


def _emit(prefix: str, suffix: str, lanes: int, reals: list[Expr], dtype: str, zero_point: int) -> Expr:
    halves, words = f"int16x{2 * lanes}", f"int8x{4 * lanes}"
    # Rounds half to even, as every conversion does unless told otherwise; one instruction where nearbyint is two.
    sums = [T.call_llvm_pure_intrin("llvm.lrint", r, dtype=f"int32x{lanes}") for r in reals]

    def half(first: Expr, second: Expr) -> Expr:
        packed = T.call_llvm_pure_intrin(f"{prefix}.packssdw{suffix}", first, second, dtype=halves)
        if not zero_point:
            return packed
        moved = splat(T.int16(zero_point), 2 * lanes)
        return T.call_llvm_pure_intrin("llvm.sadd.sat", packed, moved, dtype=halves)

    name = "packuswb" if dtype == "uint8" else "packsswb"
    low, high = half(sums[0], sums[1]), half(sums[2], sums[3])
    packed = T.call_llvm_pure_intrin(f"{prefix}.{name}{suffix}", low, high, dtype=words)
    quarters = lanes // 4
    order = [p % quarters * 4 + p // quarters for p in range(lanes)]
    ordered = shuffle(T.reinterpret(packed, dtype=f"int32x{lanes}"), order)
    return T.reinterpret(ordered, dtype=f"{dtype}x{4 * lanes}")


AVX512_NARROWING = Narrowing(16, partial(_emit, "llvm.x86.avx512", ".512", 16))
AVX2_NARROWING = Narrowing(8, partial(_emit, "llvm.x86.avx2", "", 8))
