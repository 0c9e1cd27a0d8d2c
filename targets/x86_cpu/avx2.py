"""AVX2: activations and weights widened to 16 bits, then vpmaddwd, which is exact.

vpmaddubsw would be twice as fast and saturates its 16-bit sums: 255 * 127 * 2 does not fit.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.scaffold import Expr
from bitwright.targets.x86_cpu.narrowing import AVX2_NARROWING

LANES = 8


def _emit(accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
    pair = T.reinterpret(T.broadcast(T.reinterpret(activations, dtype="int32"), LANES), dtype="int16x16")
    return _lanewise(accumulator, pair, weights)


def _lanewise(accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
    products = T.call_llvm_pure_intrin(
        "llvm.x86.avx2.pmadd.wd", activations, T.cast(weights, "int16x16"), dtype="int32x8"
    )
    return accumulator + products


AVX2 = DotInstruction(
    name="avx2_pmaddwd",
    lanes=LANES,
    step=2,
    fold=2,
    operand="int16",
    registers=16,
    weight_registers=1,
    scratch_registers=2,
    chains=4,  # only the addition is in the chain: latency 1, up to three units
    emit=_emit,
    lanewise=_lanewise,
    narrowing=AVX2_NARROWING,
)
