"""How ARM multiplies codes of few bits by 8-bit activations: as signed bytes; codes of 8 bits are stored less 128."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Expr, shuffle
from bitwright.compiler.lower.templates.weight_only_geometry import CodeInstruction
from bitwright.targets.arm_cpu.neon import NEON
from bitwright.targets.arm_cpu.sdot import SDOT

LARGEST_ACTIVATION, LARGEST_SIGNED = 127, 128
INT16_MAX = 2**15 - 1


def _sdot(total: Expr, pairs: Sequence[tuple[Expr, Expr]], _largest: int) -> Expr:
    for codes, activations in pairs:
        total = T.call_llvm_pure_intrin(
            "llvm.aarch64.neon.sdot",
            total,
            T.reinterpret(codes, dtype="int8x16"),
            activations,
            dtype="int32x4",
        )
    return total


def _neon(total: Expr, pairs: Sequence[tuple[Expr, Expr]], largest: int) -> Expr:
    """Add products in 16 bits as long as no sum of two neighbours can leave them, then in 32."""
    fitting = INT16_MAX // (2 * min(largest, LARGEST_SIGNED) * LARGEST_ACTIVATION)
    for start in range(0, len(pairs), fitting):
        group = pairs[start : start + fitting]
        halves = [_sum_of_products(group, first) for first in (0, 8)]
        neighbours = T.call_llvm_pure_intrin("llvm.aarch64.neon.addp", *halves, dtype="int16x8")
        total = total + T.call_llvm_pure_intrin("llvm.aarch64.neon.saddlp", neighbours, dtype="int32x4")
    return total


def _sum_of_products(pairs: Sequence[tuple[Expr, Expr]], first: int) -> Expr:
    """Return int16x8: bytes ``first`` to ``first + 8`` multiplied and summed over the pairs."""
    lanes = range(first, first + 8)
    total = None
    for codes, activations in pairs:
        left = T.cast(shuffle(T.reinterpret(codes, dtype="int8x16"), lanes), "int16x8")
        right = T.cast(shuffle(activations, lanes), "int16x8")
        total = left * right if total is None else total + left * right
    return total


CODE_SDOT = CodeInstruction(
    name=SDOT.name, lanes=4, registers=32, signed=True, in_place=False, slots=1.0, batch=1, emit=_sdot
)
CODE_NEON = CodeInstruction(
    name=NEON.name, lanes=4, registers=32, signed=True, in_place=False, slots=2.25, batch=8, emit=_neon
)
