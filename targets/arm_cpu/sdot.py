"""ARM dot product extension: 16 signed products added into 4 int32 lanes."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.scaffold import Expr

LANES = 4


def _emit(accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
    four = T.broadcast(T.reinterpret(activations, dtype="int32"), LANES)
    return T.call_llvm_pure_intrin(
        "llvm.aarch64.neon.sdot", accumulator, weights, T.reinterpret(four, dtype="int8x16"), dtype="int32x4"
    )


SDOT = DotInstruction(
    name="neon_sdot",
    lanes=LANES,
    step=4,
    fold=4,
    operand="int8",
    registers=32,
    weight_registers=1,
    scratch_registers=3,
    chains=8,  # latency 3 to 4, two units
    emit=_emit,
)
