"""The block formats as numbers: levels, scales and what lies where in a block's bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.gguf import types
from bitwright.compiler.gguf.bit_planes import (
    Bytes,
    from_halves,
    halves,
    pack,
    pack_scale_min,
    pack_six_bits,
    unpack,
    unpack_scale_min,
    unpack_six_bits,
)
from bitwright.compiler.gguf.types import TensorType

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

# The levels of IQ4_NL: more of them where weights are.
NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int32)


@dataclass(frozen=True)
class Format:
    """What the codes of a block mean.

    An element is ``d * s * level - dmin * m``: d and dmin are float16 numbers of the block, s and m are integers of a
    group of it, the level is the element's code plus ``low``. Formats of one group have no s (it is 1); their m is
    -1 where a minimum is stored, as they add it.

    Attributes:
        type: Its name and size.
        low: The smallest level.
        high: The largest level.
        group: Elements that share s and m.
        scale: Smallest and largest s.
        offset: Largest m; 0 if there is no dmin.
        added: The block's second number is added as it is, and may have any sign.
    """

    type: TensorType
    low: int
    high: int
    group: int
    scale: tuple[int, int] = (1, 1)
    offset: int = 0
    added: bool = False

    @property
    def groups(self) -> int:
        """Groups of a block."""
        return self.type.block // self.group

    @property
    def two_level(self) -> bool:
        """Whether groups have integer scales."""
        return self.scale != (1, 1)


FORMATS = {
    f.type: f
    for f in (
        Format(types.Q8_0, -127, 127, 32),
        Format(types.Q4_0, -8, 7, 32),
        Format(types.Q5_0, -16, 15, 32),
        Format(types.Q4_1, 0, 15, 32, added=True),
        Format(types.Q5_1, 0, 31, 32, added=True),
        Format(types.IQ4_NL, 0, 15, 32),
        Format(types.Q2_K, 0, 3, 16, (0, 15), 15),
        Format(types.Q3_K, -4, 3, 16, (-32, 31)),
        Format(types.Q4_K, 0, 15, 32, (0, 63), 63),
        Format(types.Q5_K, 0, 31, 32, (0, 63), 63),
        Format(types.Q6_K, -32, 31, 16, (-128, 127)),
    )
}


@dataclass(frozen=True, eq=False)
class Codes:
    """Rounded blocks, not packed yet.

    Attributes:
        d: Scale of each block, exactly representable as float16, float32, shape (n,).
        dmin: The second number of each block, float32, shape (n,); zeros if the format has none.
        scale: s of each group, int32, shape (n, groups).
        offset: m of each group, int32, shape (n, groups).
        level: Levels (for IQ4_NL indices into its list), int32, shape (n, block).
    """

    d: Float32
    dmin: Float32
    scale: Int32
    offset: Int32
    level: Int32


def encode(fmt: Format, codes: Codes) -> Bytes:
    """Return the bytes of rounded blocks, shape (n, bytes of a block)."""
    d, dmin = halves(codes.d), halves(codes.dmin)
    q: Bytes = (codes.level - fmt.low).astype(np.uint8)
    low, high = q & np.uint8(15), q >> np.uint8(4)
    scale, offset = codes.scale.astype(np.uint8), codes.offset.astype(np.uint8)
    match fmt.type.name:
        case "Q8_0":
            parts = [d, codes.level.astype(np.int8).view(np.uint8)]
        case "Q4_0" | "IQ4_NL":
            parts = [d, pack(q, 4, 16)]
        case "Q4_1":
            parts = [d, dmin, pack(q, 4, 16)]
        case "Q5_0":
            parts = [d, pack(high, 1, 1), pack(low, 4, 16)]
        case "Q5_1":
            parts = [d, dmin, pack(high, 1, 1), pack(low, 4, 16)]
        case "Q2_K":
            parts = [scale | offset << np.uint8(4), pack(q, 2, 32), d, dmin]
        case "Q3_K":
            parts = [
                pack(q >> np.uint8(2), 1, 32),
                pack(q & np.uint8(3), 2, 32),
                pack_six_bits((codes.scale + 32).astype(np.uint8)),
                d,
            ]
        case "Q4_K":
            parts = [d, dmin, pack_scale_min(scale, offset), pack(q, 4, 32)]
        case "Q5_K":
            parts = [d, dmin, pack_scale_min(scale, offset), pack(high, 1, 32), pack(low, 4, 32)]
        case _:  # Q6_K
            parts = [pack(low, 4, 64), pack(high, 2, 32), codes.scale.astype(np.int8).view(np.uint8), d]
    return np.concatenate(parts, axis=1)


def codes_of(fmt: Format, stored: Bytes) -> Codes:
    """Return what :func:`encode` was given.

    Args:
        fmt: The format.
        stored: Blocks, shape (n, bytes of a block).
    """
    read, name = _Reader(stored), fmt.type.name
    if fmt.two_level:
        scale, offset, q, d, dmin = _LARGE[name](read)
        found = dmin if dmin is not None else np.zeros_like(d)
        kept = offset if dmin is not None else np.zeros(scale.shape)
        level = q.astype(np.int32) + fmt.low
        return Codes(d[:, 0], found[:, 0], scale.astype(np.int32), kept.astype(np.int32), level)
    d = read.half()
    dmin = read.half() if fmt.added else np.zeros_like(d)
    if name == "Q8_0":
        level = read.take(32).view(np.int8).astype(np.int32)
    else:
        level = _small(read, fmt).astype(np.int32) + fmt.low
    ones = np.ones((len(stored), 1), np.int32)
    return Codes(d[:, 0], dmin[:, 0], ones, -ones if fmt.added else 0 * ones, level)


def decode(fmt: Format, stored: Bytes) -> Float32:
    """Return the values of stored blocks, float32, shape (n, block), with ggml's order of operations."""
    read = _Reader(stored)
    match fmt.type.name:
        case "Q8_0":
            d = read.half()
            return read.take(32).view(np.int8).astype(np.float32) * d
        case "Q4_0" | "Q5_0":
            d = read.half()
            return d * (_small(read, fmt) + np.float32(fmt.low))
        case "IQ4_NL":
            d = read.half()
            return d * NONLINEAR.astype(np.float32)[unpack(read.take(16), 4, 16)]
        case "Q4_1" | "Q5_1":
            d, m = read.half(), read.half()
            return d * _small(read, fmt) + m
        case _:
            return _large(fmt, read)


def _small(read: _Reader, fmt: Format) -> Float32:
    """Return the codes of a block of 32, the fifth bits first if there are any."""
    fifth = unpack(read.take(4), 1, 1) << np.uint8(4) if fmt.type.name.startswith("Q5") else np.uint8(0)
    return (unpack(read.take(16), 4, 16) | fifth).astype(np.float32)


def _large(fmt: Format, read: _Reader) -> Float32:
    """Return the values of blocks with integer scales."""
    scale, offset, q, d, dmin = _LARGE[fmt.type.name](read)
    level = q.reshape(len(q), fmt.groups, fmt.group).astype(np.float32) + np.float32(fmt.low)
    value: Float32 = (d * scale.astype(np.float32))[:, :, None] * level
    if dmin is not None:
        value = value - (dmin * offset.astype(np.float32))[:, :, None]
    return value.reshape(len(q), -1).astype(np.float32, copy=False)


Parts = tuple[NDArray[np.generic], Bytes, Bytes, Float32, Float32 | None]


def _q2(read: _Reader) -> Parts:
    both, q = read.take(16), unpack(read.take(64), 2, 32)
    d, dmin = read.half(), read.half()
    return both & np.uint8(15), both >> np.uint8(4), q, d, dmin


def _q3(read: _Reader) -> Parts:
    high = unpack(read.take(32), 1, 32) << np.uint8(2)
    q = unpack(read.take(64), 2, 32) | high
    scale = unpack_six_bits(read.take(12)).astype(np.int32) - 32
    return scale, q, q, read.half(), None


def _q4(read: _Reader) -> Parts:
    d, dmin = read.half(), read.half()
    scale, offset = unpack_scale_min(read.take(12))
    return scale, offset, unpack(read.take(128), 4, 32), d, dmin


def _q5(read: _Reader) -> Parts:
    d, dmin = read.half(), read.half()
    scale, offset = unpack_scale_min(read.take(12))
    high = unpack(read.take(32), 1, 32) << np.uint8(4)
    return scale, offset, unpack(read.take(128), 4, 32) | high, d, dmin


def _q6(read: _Reader) -> Parts:
    low = unpack(read.take(128), 4, 64)
    q = low | unpack(read.take(64), 2, 32) << np.uint8(4)
    scale = read.take(16).view(np.int8)
    return scale, q, q, read.half(), None


_LARGE = {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}


class _Reader:
    """Takes a block's bytes from the front, for all blocks at once."""

    def __init__(self, stored: Bytes) -> None:
        self._stored, self._at = stored, 0

    def take(self, count: int) -> Bytes:
        part = self._stored[:, self._at : self._at + count]
        self._at += count
        return np.ascontiguousarray(part)

    def half(self) -> Float32:
        return from_halves(self.take(2))
