"""From int32 accumulators to output values on Cortex-M, equal bit for bit to the program's expression.

``clip(rint(x) + z, lower, upper)`` is computed as a conversion to int32 that rounds half to even and saturates (vcvtr,
vcvtn), an integer clamp to ``[lower - z, upper - z]`` and an integer addition. Both are the same: the bounds are
integers, and what saturates is clamped either way.
"""

from __future__ import annotations

from collections.abc import Iterator

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.epilogue import Epilogue
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, load, splat, vector_type


def emit_epilogue(
    epilogue: Epilogue, total: Expr, constants: list[Buffer], channel: Expr, lanes: int
) -> Expr:
    """Return the output values of ``lanes`` neighbouring channels.

    Args:
        epilogue: What to compute.
        total: int32 vector of accumulators, the bias included.
        constants: Flat buffers behind the bias, in the order of ``channel_constants``.
        channel: Index of the first channel in those buffers.
        lanes: Number of channels.
    """
    multiplier, *rest = (load(c, [channel], lanes) for c in constants)
    real = T.cast(total, vector_type("float32", lanes))
    if epilogue.dtype == "float32":
        addend = rest[0] if rest else splat(T.float32(0), lanes)
        value = T.call_llvm_pure_intrin(
            "llvm.fma", real, multiplier, addend, dtype=vector_type("float32", lanes)
        )
        return T.max(value, splat(T.float32(0), lanes)) if epilogue.relu else value
    steps = _rounded(real * multiplier, lanes)
    low, high = epilogue.lower - epilogue.zero_point, epilogue.upper - epilogue.zero_point
    clamped = T.max(T.min(steps, splat(T.int32(high), lanes)), splat(T.int32(low), lanes))
    shifted = clamped + splat(T.int32(epilogue.zero_point), lanes)
    return T.cast(shifted, vector_type(epilogue.dtype, lanes))


def whole_vectors(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Split ``length`` into (offset, lanes): full vectors, then single elements; there are no narrower vectors."""
    full = length // width * width
    yield from ((offset, width) for offset in range(0, full, width))
    yield from ((offset, 1) for offset in range(full, length))


def _rounded(value: Expr, lanes: int) -> Expr:
    """Convert to int32: half to even, saturating."""
    if lanes == 1:
        # Rounds as the status register says, which is half to even unless somebody changed it; the result is an
        # integer in a floating-point register.
        bits = T.call_llvm_pure_intrin("llvm.arm.vcvtr", value, dtype="float32")
        return T.reinterpret(bits, dtype="int32")
    return T.call_llvm_pure_intrin("llvm.arm.mve.vcvtn", T.int32(0), value, dtype=vector_type("int32", lanes))
