"""ARM int8 matrix multiplication (i8mm): 2 pixels x 8 elements times 8 elements x 2 channels into 2 x 2 int32."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.mmla import MatrixInstruction
from bitwright.compiler.lower.templates.scaffold import Expr, shuffle
from bitwright.targets.arm_cpu.narrowing import NEON_NARROWING

FOLD = 8


def _spread(pixels: list[Expr], size: int) -> list[Expr]:
    first, second = pixels
    steps = range(0, size, FOLD)
    return [
        shuffle([first, second], [part + at + i for part in (0, size) for i in range(FOLD)]) for at in steps
    ]


def _multiply(total: Expr, activations: Expr, weights: Expr) -> Expr:
    return T.call_llvm_pure_intrin("llvm.aarch64.neon.smmla", total, activations, weights, dtype="int32x4")


SMMLA = MatrixInstruction(
    name="neon_smmla",
    rows=2,
    lanes=2,
    fold=FOLD,
    operand="int8",
    registers=32,
    spread=_spread,
    spread_cost=1,  # zip1 or zip2
    multiply=_multiply,
    narrowing=NEON_NARROWING,
)
