"""ARM dot product extension: 16 signed products added into 4 int32 lanes.

Two forms: ``SDOT`` repeats 4 activations in every lane with a load; ``SDOT_BY_ELEMENT`` keeps 16 of them in a register
and names the lane in the instruction, which takes a quarter of the loads.
"""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.mmla import MatrixInstruction
from bitwright.compiler.lower.templates.scaffold import Expr, shuffle, splat, vector_type
from bitwright.targets.arm_cpu.narrowing import NEON_NARROWING

NAME, LANES, FOLD = "neon_sdot", 4, 4


def _multiply(total: Expr, activations: Expr, weights: Expr) -> Expr:
    return T.call_llvm_pure_intrin("llvm.aarch64.neon.sdot", total, weights, activations, dtype="int32x4")


def _emit(accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
    four = T.broadcast(T.reinterpret(activations, dtype="int32"), LANES)
    return _multiply(accumulator, T.reinterpret(four, dtype="int8x16"), weights)


def _spread(pixels: list[Expr], size: int) -> list[Expr]:
    count = size // FOLD
    words = T.reinterpret(pixels[0], dtype=vector_type("int32", count))
    # A shuffle has at most as many lanes as its operands together.
    sources = [words] * (LANES // count)
    repeated = [splat(words, LANES)] if count == 1 else [shuffle(sources, [i] * LANES) for i in range(count)]
    return [T.reinterpret(four, dtype="int8x16") for four in repeated]


SDOT = DotInstruction(
    name=NAME,
    lanes=LANES,
    step=4,
    fold=4,
    operand="int8",
    registers=32,
    weight_registers=1,
    scratch_registers=3,
    chains=8,  # latency 3 to 4, two units
    emit=_emit,
    lanewise=_multiply,
    narrowing=NEON_NARROWING,
    interleaved=16,  # an st4 of four registers
)
SDOT_BY_ELEMENT = MatrixInstruction(
    name=NAME,
    rows=1,
    lanes=LANES,
    fold=FOLD,
    operand="int8",
    registers=32,
    spread=_spread,
    spread_cost=0,
    multiply=_multiply,
    narrowing=NEON_NARROWING,
)
