"""From int32 accumulators to output values: the one expression every runtime must reproduce bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.instruction import Narrowing
from bitwright.compiler.lower.templates.scaffold import (
    Buffer,
    Expr,
    held,
    load,
    pieces,
    shuffle,
    splat,
    store,
    vector_type,
)
from bitwright.compiler.program.ops import Dot, Program


@dataclass(frozen=True)
class Epilogue:
    """What happens to an accumulator; everything in it is compiled into the function.

    Attributes:
        dtype: Output element type: ``uint8``, ``int8`` or ``float32``.
        zero_point: Of an integer output.
        lower, upper: Clamp of an integer output.
        relu: Clamp of a float output at 0.
        float_bias: A float bias array is among the constants.
        bounded: No scaled accumulator can reach 2^30, whatever the activations: the conversion to integers needs no
            clamp before it.
    """

    dtype: str
    zero_point: int = 0
    lower: int = 0
    upper: int = 0
    relu: bool = False
    float_bias: bool = False
    bounded: bool = False


@dataclass(frozen=True)
class Part:
    """One vector of accumulators, the bias included, and where its values go.

    Attributes:
        accumulator: int32 vector, or float32 with the same values where the template converts them itself.
        channel: Index of its first channel in the constants.
        at: Index of its first value in the output.
        used: How many of its lanes are values; the others are padding.
        follows: Its values lie right behind those of the part before it.
    """

    accumulator: Expr
    channel: Expr
    at: Expr
    used: int
    follows: bool = False


PACKED_VECTORS, UNPACKED_LANES, WIDEST_STORE = 4, 16, 64
SAFE_TO_CONVERT = float(1 << 30)


def epilogue_of(step: Dot, program: Program) -> Epilogue:
    """Return the epilogue of a step."""
    output = program.tensor(step.output)
    if output.quant is None:
        return Epilogue("float32", relu=step.relu, float_bias=step.float_bias is not None)
    bounded = _largest_output(step, program) < SAFE_TO_CONVERT
    return Epilogue(output.quant.dtype, output.quant.zero_point, step.lower, step.upper, bounded=bounded)


def _largest_output(step: Dot, program: Program) -> float:
    """Return a bound on the magnitude of scaled accumulators, over all activations."""
    quant, out = program.tensor(step.inputs[0]).quant, program.tensor(step.output).quant
    assert quant is not None and out is not None
    axes = 0 if step.weight.ndim == 2 else (1, 2, 3)
    sums = 255.0 * np.abs(step.weight.astype(np.int16)).sum(axis=axes, dtype=np.int64)
    if step.bias is not None:
        sums = sums + np.abs(step.bias.astype(np.int64))
    return float((sums * step.weight_scale.astype(np.float64)).max() * quant.scale / out.scale)


def channel_constants(step: Dot, program: Program, shift: int) -> dict[str, np.ndarray]:
    """Return the per-channel arrays [O] of the epilogue: folded bias int32, multiplier float32, float bias.

    The bias takes back the zero point and the shift: ``bias - (zx + shift) * sum_k w[o, k]``, modulo 2^32.

    Args:
        step: The dot product.
        program: For the scales of its tensors.
        shift: What staging adds to the activations, see ``Staging.shift``.
    """
    quant, out = program.tensor(step.inputs[0]).quant, program.tensor(step.output).quant
    assert quant is not None
    axes = 0 if step.weight.ndim == 2 else (1, 2, 3)
    bias = -(quant.zero_point + shift) * step.weight.sum(axis=axes, dtype=np.int64)
    if step.bias is not None:
        bias = bias + step.bias
    multiplier = np.float32(quant.scale) * step.weight_scale.astype(np.float32)
    if out is not None:
        multiplier = multiplier / np.float32(out.scale)
    arrays = {"bias": bias.astype(np.int32), "multiplier": multiplier.astype(np.float32)}
    if out is None and step.float_bias is not None:
        arrays["float_bias"] = step.float_bias.astype(np.float32)
    return arrays


def emit_epilogue(
    epilogue: Epilogue, accumulator: Expr, constants: list[Buffer], channel: Expr, lanes: int
) -> Expr:
    """Return the output values of ``lanes`` neighbouring channels.

    Args:
        epilogue: What to compute.
        accumulator: int32 vector without the bias.
        constants: Flat buffers in the order of ``channel_constants``.
        channel: Index of the first channel in those buffers.
        lanes: Number of channels.
    """
    bias, *rest = (load(c, [channel], lanes) for c in constants)
    return _finished(epilogue, accumulator + bias, rest, lanes)


def _finished(epilogue: Epilogue, total: Expr, constants: list[Expr], lanes: int) -> Expr:
    """Return output values from sums, given the multiplier and, if there is one, the float bias."""
    multiplier, *rest = constants
    total = T.cast(total, vector_type("float32", lanes))
    if epilogue.dtype == "float32":
        addend = rest[0] if rest else splat(T.float32(0), lanes)
        # Spelled as the LLVM intrinsic: a product and a sum would round once or twice as the CPU pleases.
        value = T.call_llvm_pure_intrin(
            "llvm.fma", total, multiplier, addend, dtype=vector_type("float32", lanes)
        )
        return T.max(value, splat(T.float32(0), lanes)) if epilogue.relu else value
    low, high = (float(bound - epilogue.zero_point) for bound in (epilogue.lower, epilogue.upper))
    rounded = T.nearbyint(total * multiplier)
    clamped = T.max(T.min(rounded, splat(T.float32(high), lanes)), splat(T.float32(low), lanes))
    shifted = T.cast(clamped, vector_type("int32", lanes)) + splat(T.int32(epilogue.zero_point), lanes)
    return T.cast(shifted, vector_type(epilogue.dtype, lanes))


def store_parts(
    epilogue: Epilogue,
    parts: Sequence[Part],
    constants: list[Buffer],
    output: Buffer,
    lanes: int,
    narrowing: Narrowing | None,
) -> None:
    """Emit the epilogue of several vectors of accumulators that already hold the bias, and store the values.

    Args:
        epilogue: What to compute.
        parts: In the order of memory.
        constants: Flat buffers in the order of ``channel_constants``.
        output: Flat view of the output.
        lanes: Of every part's accumulator.
        narrowing: The processor's way to bytes, used four parts at a time where the values allow it.
    """
    packs = (
        narrowing is not None
        and narrowing.lanes == lanes
        and epilogue.dtype != "float32"
        and epilogue.bounded
    )
    width = PACKED_VECTORS if packs else max(1, UNPACKED_LANES // lanes)
    for first, count in pieces(len(parts), width):
        group = parts[first : first + count]
        if packs and narrowing is not None:
            value, total = _packed(epilogue, group, constants[1], narrowing), PACKED_VECTORS * lanes
        else:
            loaded = [_joined([load(c, [p.channel], lanes) for p in group], lanes) for c in constants[1:]]
            total = len(group) * lanes
            value = _finished(epilogue, _joined([p.accumulator for p in group], lanes), loaded, total)
        runs = list(_runs(group, lanes))
        if sum(len(list(pieces(length, WIDEST_STORE))) for _, _, length in runs) > 2:
            value = held(value, epilogue.dtype, total)
        for start, at, length in runs:
            _store_piecewise(output, value, at, start, length, total)


def _joined(vectors: list[Expr], lanes: int) -> Expr:
    return vectors[0] if len(vectors) == 1 else shuffle(vectors, range(len(vectors) * lanes))


def _packed(epilogue: Epilogue, group: Sequence[Part], multiplier: Buffer, narrowing: Narrowing) -> Expr:
    lanes = narrowing.lanes
    reals = [
        T.cast(p.accumulator, vector_type("float32", lanes)) * load(multiplier, [p.channel], lanes)
        for p in group
    ]
    reals += reals[-1:] * (PACKED_VECTORS - len(reals))
    # Bounds inside the type's, before rounding to bytes: LLVM 22 loops for ever over some shuffles of clamped bytes.
    info = np.iinfo(epilogue.dtype)
    if epilogue.lower > info.min:
        least = splat(T.float32(epilogue.lower - epilogue.zero_point), lanes)
        reals = [T.max(real, least) for real in reals]
    if epilogue.upper < info.max:
        most = splat(T.float32(epilogue.upper - epilogue.zero_point), lanes)
        reals = [T.min(real, most) for real in reals]
    return narrowing.emit(reals, epilogue.dtype, epilogue.zero_point)


def _runs(group: Sequence[Part], lanes: int) -> Iterator[tuple[int, Expr, int]]:
    """Yield (first lane, output index, length) of the stretches of a packed vector that are contiguous in memory."""
    start = 0
    for index, part in enumerate(group):
        ends = index + 1 == len(group) or not group[index + 1].follows or part.used < lanes
        if ends:
            yield start * lanes, group[start].at, (index - start) * lanes + part.used
            start = index + 1


def _store_piecewise(output: Buffer, value: Expr, at: Expr, start: int, length: int, lanes: int) -> None:
    """Store ``length`` of a vector's lanes from ``start`` on, in as few stores as powers of two allow."""
    for offset, width in pieces(length, WIDEST_STORE):
        whole = start + offset == 0 and width == lanes
        taken = value if whole else shuffle(value, range(start + offset, start + offset + width))
        store(output, taken, [at + offset], width)
