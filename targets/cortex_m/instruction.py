"""How the processors multiply bytes: pairs of 16-bit products (smlad), or sixteen at once (vmladava)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Expr

Operand = tuple[Expr, ...]


@dataclass(frozen=True)
class PatchInstruction:
    """An instruction (or a short exact sequence) that adds a run of products of bytes to one int32 register.

    Attributes:
        name: Name of the profile's compute row.
        chunk: Bytes of either operand that it consumes at once.
        unpack: int8 x chunk -> what ``add`` multiplies; done once for a value that several products share.
        add: (int32 accumulator, activations, weights) -> the new accumulator.
        lanes: float32 values that one instruction of the epilogue handles.
        accumulators: General registers that are left for accumulators.
    """

    name: str
    chunk: int
    unpack: Callable[[Expr], Operand]
    add: Callable[[Expr, Operand, Operand], Expr]
    lanes: int
    accumulators: int


def _halves(four: Expr) -> Operand:
    """Return bytes 0 and 2, and bytes 1 and 3, as pairs of 16-bit values; sxtb16 takes a rotated register for free."""
    word = T.reinterpret(four, dtype="uint32")
    rotated = T.bitwise_or(T.shift_right(word, T.uint32(8)), T.shift_left(word, T.uint32(24)))
    return tuple(
        T.call_llvm_pure_intrin("llvm.arm.sxtb16", T.reinterpret(w, dtype="int32"), dtype="int32")
        for w in (word, rotated)
    )


def _smlad(accumulator: Expr, activations: Operand, weights: Operand) -> Expr:
    for pair, weight in zip(activations, weights, strict=True):
        accumulator = T.call_llvm_pure_intrin("llvm.arm.smlad", pair, weight, accumulator, dtype="int32")
    return accumulator


def _vmladava(accumulator: Expr, activations: Operand, weights: Operand) -> Expr:
    signed, added, straight = T.int32(0), T.int32(0), T.int32(0)
    return T.call_llvm_pure_intrin(
        "llvm.arm.mve.vmldava", signed, added, straight, accumulator, *activations, *weights, dtype="int32"
    )


SMLAD = PatchInstruction("dsp_smlad", 4, _halves, _smlad, lanes=1, accumulators=4)
VMLADAVA = PatchInstruction("mve_vmladava", 16, lambda value: (value,), _vmladava, lanes=4, accumulators=4)
INSTRUCTIONS = {i.name: i for i in (SMLAD, VMLADAVA)}
