"""AVX-512 VNNI: 64 products of unsigned activations and signed weights added into 16 int32 lanes."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import DotInstruction
from bitwright.compiler.lower.templates.scaffold import Expr
from bitwright.targets.x86_cpu.narrowing import AVX512_NARROWING

LANES = 16


def _emit(accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
    four = T.broadcast(T.reinterpret(activations, dtype="int32"), LANES)
    return _lanewise(accumulator, four, weights)


def _lanewise(accumulator: Expr, activations: Expr, weights: Expr) -> Expr:
    # LLVM 22 declares the operands as 64 bytes; older versions took them as 16 integers.
    return T.call_llvm_pure_intrin(
        "llvm.x86.avx512.vpdpbusd.512",
        accumulator,
        T.reinterpret(activations, dtype="int8x64"),
        weights,
        dtype="int32x16",
    )


VNNI = DotInstruction(
    name="avx512_vnni",
    lanes=LANES,
    step=4,
    fold=4,
    operand="uint8",
    registers=32,
    weight_registers=1,
    scratch_registers=2,
    chains=10,  # latency 5, two units
    emit=_emit,
    lanewise=_lanewise,
    narrowing=AVX512_NARROWING,
    parallel_macs=1 << 21,
)
