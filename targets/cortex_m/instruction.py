"""How the processors multiply bytes: pairs of 16-bit products (smlad), or sixteen at once (vmladava, vmull)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Expr, shuffle
from bitwright.targets.cortex_m.accumulators import Accumulators
from bitwright.targets.cortex_m.epilogue import (
    Convert,
    rounded_by_addition,
    rounded_by_helium,
    rounded_scalar,
)

Operand = tuple[Expr, ...]
CHANNELS = 4  # of one tap of a depthwise convolution
SMALLEST_PAIRED = -127  # weight of which two products with any byte fit into 16 bits


@dataclass(frozen=True)
class PatchInstruction:
    """An instruction (or a short exact sequence) that adds a run of products of bytes to one int32 register.

    Attributes:
        name: Name of the profile's compute row.
        chunk: Bytes of either operand that it consumes at once.
        unpack: int8 x chunk -> what ``add`` multiplies; done once for a value that several products share.
        add: (int32 accumulator, activations, weights) -> the new accumulator.
        tap: (int32 accumulators, activations int8 x 4, weights int8 x 4): adds four products of neighbouring channels,
            for depthwise convolutions.
        lanes: float32 values that one instruction of the epilogue handles.
        accumulators: Registers that are left for accumulators.
        convert: How several floats are rounded to integers.
        partial_sums: An accumulator is a vector of four sums, which ``add`` reads and returns.
        variant: Tells apart instructions of one name.
        wide: What to use instead for weights of -128, or None if there is no difference.
    """

    name: str
    chunk: int
    unpack: Callable[[Expr], Operand]
    add: Callable[[Expr, Operand, Operand], Expr]
    tap: Callable[[Accumulators, Expr, Expr], None]
    lanes: int
    accumulators: int
    convert: Convert
    partial_sums: bool = False
    variant: str = ""
    wide: PatchInstruction | None = None

    def for_weights(self, weights: np.ndarray) -> PatchInstruction:
        """Return the form that is exact for these weights."""
        return self.wide if self.wide is not None and weights.min(initial=0) < SMALLEST_PAIRED else self


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


def _tap_of_halves(totals: Accumulators, activations: Expr, weights: Expr) -> None:
    pairs = zip(_halves(activations), _halves(weights), strict=True)
    for first, (left, right) in enumerate(pairs):
        for channel, name in ((first, "llvm.arm.smlabb"), (first + 2, "llvm.arm.smlatt")):
            total = T.call_llvm_pure_intrin(name, left, right, totals.load(channel), dtype="int32")
            totals.store(channel, total)


def _tap_of_vectors(totals: Accumulators, activations: Expr, weights: Expr) -> None:
    product = T.cast(activations, "int32x4") * T.cast(weights, "int32x4")
    totals.store(0, totals.load(0, CHANNELS) + product)


def _pairwise_added(accumulator: Expr, products: Expr) -> Expr:
    name = "llvm.arm.neon.vpadals.v4i32.v8i16"
    return T.call_llvm_pure_intrin(name, accumulator, products, dtype="int32x4")


def _products(activations: Operand, weights: Operand) -> list[Expr]:
    """Return the products of the lower and of the upper eight bytes, int16x8 each."""

    def half(value: Expr, first: int) -> Expr:
        return T.cast(shuffle(value, range(first, first + 8)), "int16x8")

    return [half(activations[0], first) * half(weights[0], first) for first in (0, 8)]


def _vmull(accumulator: Expr, activations: Operand, weights: Operand) -> Expr:
    """Add two products in 16 bits, which hold them: 2 * 128 * 127 < 2^15."""
    low, high = _products(activations, weights)
    return _pairwise_added(accumulator, low + high)


def _vmull_wide(accumulator: Expr, activations: Operand, weights: Operand) -> Expr:
    for products in _products(activations, weights):
        accumulator = _pairwise_added(accumulator, products)
    return accumulator


def _tap_of_long_products(totals: Accumulators, activations: Expr, weights: Expr) -> None:
    # By name: LLVM finds no long product where bytes are widened twice.
    wide = (T.cast(value, "int16x4") for value in (activations, weights))
    product = T.call_llvm_pure_intrin("llvm.arm.neon.vmulls.v4i32", *wide, dtype="int32x4")
    totals.store(0, totals.load(0, CHANNELS) + product)


SMLAD = PatchInstruction("dsp_smlad", 4, _halves, _smlad, _tap_of_halves, 1, 4, rounded_scalar)
VMLADAVA = PatchInstruction(
    "mve_vmladava", 16, lambda value: (value,), _vmladava, _tap_of_vectors, 4, 8, rounded_by_helium
)
VMULL_WIDE = PatchInstruction(
    "neon_vmull",
    16,
    lambda value: (value,),
    _vmull_wide,
    _tap_of_long_products,
    4,
    8,
    rounded_by_addition,
    partial_sums=True,
    variant="wide",
)
VMULL = replace(VMULL_WIDE, add=_vmull, variant="", wide=VMULL_WIDE)
INSTRUCTIONS = {i.name: i for i in (SMLAD, VMLADAVA, VMULL)}
