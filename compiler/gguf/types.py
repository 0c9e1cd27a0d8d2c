"""The tensor types of GGUF files that are read and written here, and how many bytes they take."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.compiler.errors import UsageError, nearest

SMALL, LARGE = 32, 256


@dataclass(frozen=True)
class TensorType:
    """How the elements of a tensor are stored.

    Attributes:
        name: As ggml writes it.
        number: In the file.
        block: Elements that are stored together; rows are cut into such blocks.
        bytes: Of a block.
    """

    name: str
    number: int
    block: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits of one element, scales included."""
        return 8 * self.bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row; its length must be a multiple of the block."""
        return columns // self.block * self.bytes

    def fits(self, columns: int) -> bool:
        """Tell whether rows of this length can be stored."""
        return columns % self.block == 0


F32 = TensorType("F32", 0, 1, 4)
F16 = TensorType("F16", 1, 1, 2)
Q4_0 = TensorType("Q4_0", 2, SMALL, 18)
Q4_1 = TensorType("Q4_1", 3, SMALL, 20)
Q5_0 = TensorType("Q5_0", 6, SMALL, 22)
Q5_1 = TensorType("Q5_1", 7, SMALL, 24)
Q8_0 = TensorType("Q8_0", 8, SMALL, 34)
Q2_K = TensorType("Q2_K", 10, LARGE, 84)
Q3_K = TensorType("Q3_K", 11, LARGE, 110)
Q4_K = TensorType("Q4_K", 12, LARGE, 144)
Q5_K = TensorType("Q5_K", 13, LARGE, 176)
Q6_K = TensorType("Q6_K", 14, LARGE, 210)
IQ4_NL = TensorType("IQ4_NL", 20, SMALL, 18)

TYPES = (F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL)
BY_NAME = {t.name: t for t in TYPES}
BY_NUMBER = {t.number: t for t in TYPES}

# What llama.cpp stores rows in whose length is no multiple of 256 (llama-quant.cpp, tensor_type_fallback).
FALLBACKS = {Q2_K: Q4_0, Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}


def tensor_type(name: str) -> TensorType:
    """Return the type of a name, in any case.

    Raises:
        UsageError: There is none.
    """
    found = next((t for t in TYPES if t.name.lower() == name.lower()), None)
    if found is None:
        msg = f"unknown tensor type '{name}'"
        raise UsageError(msg, where="GGUF", fix=nearest(name, list(BY_NAME)))
    return found


def fitting(wanted: TensorType, columns: int) -> TensorType:
    """Return the wanted type, or what llama.cpp takes in its place for rows of such a length."""
    if wanted.fits(columns):
        return wanted
    instead = FALLBACKS.get(wanted, F16)
    return instead if instead.fits(columns) else F16
