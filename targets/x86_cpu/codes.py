"""How x86 multiplies codes of few bits by 8-bit activations: unsigned by signed bytes, what its instructions want."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Expr
from bitwright.compiler.lower.templates.weight_only_geometry import CodeInstruction
from bitwright.targets.x86_cpu.avx2 import AVX2
from bitwright.targets.x86_cpu.vnni import VNNI

LARGEST_ACTIVATION = 127
INT16_MAX = 2**15 - 1


def _vnni(total: Expr, pairs: Sequence[tuple[Expr, Expr]], _largest: int) -> Expr:
    for codes, activations in pairs:
        total = T.call_llvm_pure_intrin(
            "llvm.x86.avx512.vpdpbusd.512",
            total,
            T.reinterpret(codes, dtype="int8x64"),
            activations,
            dtype="int32x16",
        )
    return total


def _avx2(total: Expr, pairs: Sequence[tuple[Expr, Expr]], largest: int) -> Expr:
    """Add products in 16 bits as long as no sum can leave them, then in 32; bytes are widened first."""
    fitting = INT16_MAX // (2 * largest * LARGEST_ACTIVATION)
    if not fitting:
        return _widened(total, pairs)
    for start in range(0, len(pairs), fitting):
        narrow = None
        for codes, activations in pairs[start : start + fitting]:
            products = T.call_llvm_pure_intrin(
                "llvm.x86.avx2.pmadd.ub.sw",
                T.reinterpret(codes, dtype="int8x32"),
                activations,
                dtype="int16x16",
            )
            narrow = products if narrow is None else narrow + products
        ones = T.broadcast(T.int16(1), 16)
        total = total + T.call_llvm_pure_intrin("llvm.x86.avx2.pmadd.wd", narrow, ones, dtype="int32x8")
    return total


def _widened(total: Expr, pairs: Sequence[tuple[Expr, Expr]]) -> Expr:
    """Multiply bytes of any size: the even and the odd ones of the four of each lane, as 16-bit integers."""
    eight = T.broadcast(T.int16(8), 16)
    for codes, activations in pairs:
        unsigned = T.reinterpret(codes, dtype="uint16x16")
        signed = T.reinterpret(activations, dtype="int16x16")
        even = T.bitwise_and(unsigned, T.broadcast(T.uint16(255), 16))
        odd = T.shift_right(unsigned, T.broadcast(T.uint16(8), 16))
        even_activations = T.shift_right(T.shift_left(signed, eight), eight)
        odd_activations = T.shift_right(signed, eight)
        for left, right in ((even, even_activations), (odd, odd_activations)):
            left = T.reinterpret(left, dtype="int16x16")
            total = total + T.call_llvm_pure_intrin("llvm.x86.avx2.pmadd.wd", left, right, dtype="int32x8")
    return total


CODE_VNNI = CodeInstruction(
    name=VNNI.name, lanes=16, registers=32, signed=False, in_place=True, slots=1.0, batch=1, emit=_vnni
)
CODE_AVX2 = CodeInstruction(
    name=AVX2.name, lanes=8, registers=16, signed=False, in_place=False, slots=2.25, batch=8, emit=_avx2
)
