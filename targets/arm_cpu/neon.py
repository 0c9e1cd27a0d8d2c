"""NEON without dot product: activations and weights widened to 16 bits, then smlal, which is exact."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.scaffold import Expr
from bitwright.targets.arm_cpu.narrowing import NEON_NARROWING

LANES, STEP = 4, 4


def _emit(accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
    wide = T.cast(weights, "int16x16")
    for element in range(STEP):
        lane = T.Shuffle([activations], [element])
        four = T.Shuffle([wide], [element * LANES + i for i in range(LANES)])
        accumulator = accumulator + T.cast(T.broadcast(lane, LANES), "int32x4") * T.cast(four, "int32x4")
    return accumulator


NEON = DotInstruction(
    name="neon_smlal",
    lanes=LANES,
    step=STEP,
    fold=1,
    operand="int16",
    registers=32,
    weight_registers=2,
    scratch_registers=5,  # activations and the narrow weights
    chains=4,  # one unit, accumulator forwarding
    emit=_emit,
    narrowing=NEON_NARROWING,
)
