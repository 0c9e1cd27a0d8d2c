"""Codes of few bits packed into bytes the way ggml does, and taken apart again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def pack(codes: Bytes, bits: int, run: int) -> Bytes:
    """Pack codes of 1, 2 or 4 bits.

    ggml puts codes that lie ``run`` elements apart into one byte, the first into its lowest bits, so that a vector
    instruction unpacks a run at a time.

    Args:
        codes: Smaller than ``2**bits``, uint8, shape (n, k).
        bits: Bits of a code.
        run: Elements between two codes of a byte; k is a multiple of ``run * 8 / bits``.

    Returns:
        uint8, shape (n, k * bits / 8).
    """
    parts = 8 // bits
    split = codes.reshape(len(codes), -1, parts, run)
    packed = np.zeros((len(codes), split.shape[1], run), np.uint8)
    for part in range(parts):
        packed |= split[:, :, part] << np.uint8(bits * part)
    return packed.reshape(len(codes), -1)


def unpack(packed: Bytes, bits: int, run: int) -> Bytes:
    """Return the codes that :func:`pack` packed, uint8, shape (n, k)."""
    parts = 8 // bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, parts, 1)
    split = packed.reshape(len(packed), -1, 1, run) >> shifts
    return (split & np.uint8((1 << bits) - 1)).reshape(len(packed), -1)


def halves(values: NDArray[np.floating]) -> Bytes:
    """Return float16 values as little-endian bytes; shape (n,) becomes (n, 2)."""
    return values.astype("<f2").reshape(-1, 1).view(np.uint8)


def from_halves(stored: Bytes) -> NDArray[np.float32]:
    """Return two bytes a row as float32, shape (n, 1)."""
    return np.ascontiguousarray(stored).view("<f2").astype(np.float32)


def pack_scale_min(scales: Bytes, mins: Bytes) -> Bytes:
    """Pack eight 6-bit scales and eight 6-bit minima of Q4_K and Q5_K into 12 bytes.

    The first four of both lie in the low bits of bytes 0 to 7; the low nibbles of the others share bytes 8 to 11,
    and their upper two bits are on top of bytes 0 to 7.
    """
    low = np.concatenate(
        [scales[:, :4] | (scales[:, 4:] >> 4 << 6), mins[:, :4] | (mins[:, 4:] >> 4 << 6)], axis=1
    )
    return np.concatenate([low, (scales[:, 4:] & 0x0F) | (mins[:, 4:] & 0x0F) << 4], axis=1).astype(np.uint8)


def unpack_scale_min(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Return what :func:`pack_scale_min` packed, each uint8 of shape (n, 8)."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 0x3F, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales.astype(np.uint8), mins.astype(np.uint8)


def pack_six_bits(scales: Bytes) -> Bytes:
    """Pack the sixteen 6-bit scales of Q3_K into 12 bytes: low nibbles first, then the upper two bits."""
    low, high = scales & np.uint8(0x0F), scales >> np.uint8(4)
    return np.concatenate([pack(low, 4, 8), pack(high, 2, 4)], axis=1)


def unpack_six_bits(packed: Bytes) -> Bytes:
    """Return what :func:`pack_six_bits` packed, uint8, shape (n, 16)."""
    return unpack(packed[:, :8], 4, 8) | unpack(packed[:, 8:], 2, 4) << np.uint8(4)
