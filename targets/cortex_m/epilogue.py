"""From int32 accumulators to output values on 32-bit Arm, equal bit for bit to the program's expression.

``clip(rint(x) + z, lower, upper)`` is computed as a conversion to int32 that rounds half to even and saturates (vcvtr,
vcvtn), an integer clamp to ``[lower - z, upper - z]`` and an integer addition. Both are the same: the bounds are
integers, and what saturates is clamped either way.

NEON of ARMv7 has no conversion that rounds. There the clamp comes first, on floats, which again is the same: rounding
is monotonous and leaves the bounds alone. Then 1.5 * 2^23 is added: the sum has no bits behind the point, and NEON
always rounds to nearest, half to even; its last bits are the integer. That it flushes subnormal numbers to zero changes
nothing: these round to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.epilogue import Epilogue
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, load, splat, vector_type

# (float32 vector, lowest integer, highest integer, lanes) -> int32 vector: rounded half to even and clamped.
Convert = Callable[[Expr, int, int, int], Expr]
# 1.5 * 2^23, and its bits.
ROUNDING_FLOAT, ROUNDING_BITS = 12582912.0, 0x4B400000


def emit_epilogue(
    epilogue: Epilogue, total: Expr, constants: list[Buffer], channel: Expr, lanes: int, convert: Convert
) -> Expr:
    """Return the output values of ``lanes`` neighbouring channels.

    Args:
        epilogue: What to compute.
        total: int32 vector of accumulators, the bias included.
        constants: Flat buffers behind the bias, in the order of ``channel_constants``.
        channel: Index of the first channel in those buffers.
        lanes: Number of channels.
        convert: The instruction's way to round more than one lane.
    """
    multiplier, *rest = (load(c, [channel], lanes) for c in constants)
    real = T.cast(total, vector_type("float32", lanes))
    if epilogue.dtype == "float32":
        addend = rest[0] if rest else splat(T.float32(0), lanes)
        value = T.call_llvm_pure_intrin(
            "llvm.fma", real, multiplier, addend, dtype=vector_type("float32", lanes)
        )
        return T.max(value, splat(T.float32(0), lanes)) if epilogue.relu else value
    low, high = epilogue.lower - epilogue.zero_point, epilogue.upper - epilogue.zero_point
    clamped = (rounded_scalar if lanes == 1 else convert)(real * multiplier, low, high, lanes)
    shifted = clamped + splat(T.int32(epilogue.zero_point), lanes)
    return T.cast(shifted, vector_type(epilogue.dtype, lanes))


def whole_vectors(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Split ``length`` into (offset, lanes): full vectors, then single elements; there are no narrower vectors."""
    full = length // width * width
    yield from ((offset, width) for offset in range(0, full, width))
    yield from ((offset, 1) for offset in range(full, length))


def rounded_scalar(value: Expr, low: int, high: int, lanes: int = 1) -> Expr:
    """Convert one float by vcvtr.

    It rounds as the status register says, which is half to even unless somebody changed it; the result is an integer in
    a floating-point register.
    """
    bits = T.call_llvm_pure_intrin("llvm.arm.vcvtr", value, dtype="float32")
    return _clamped(T.reinterpret(bits, dtype="int32"), low, high, lanes)


def rounded_by_helium(value: Expr, low: int, high: int, lanes: int) -> Expr:
    """Convert a vector by vcvtn."""
    kind = vector_type("int32", lanes)
    steps = T.call_llvm_pure_intrin("llvm.arm.mve.vcvtn", T.int32(0), value, dtype=kind)
    return _clamped(steps, low, high, lanes)


def rounded_by_addition(value: Expr, low: int, high: int, lanes: int) -> Expr:
    """Convert a vector by adding 1.5 * 2^23; at most 2^22 steps from 0."""
    floor, ceiling, magic = (splat(T.float32(v), lanes) for v in (low, high, ROUNDING_FLOAT))
    limited = T.max(T.min(value, ceiling), floor)
    bits = T.reinterpret(limited + magic, dtype=vector_type("int32", lanes))
    return bits - splat(T.int32(ROUNDING_BITS), lanes)


def _clamped(steps: Expr, low: int, high: int, lanes: int) -> Expr:
    return T.max(T.min(steps, splat(T.int32(high), lanes)), splat(T.int32(low), lanes))
