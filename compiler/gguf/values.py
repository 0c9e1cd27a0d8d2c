"""Metadata values of GGUF files: their types, sizes and bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

Scalar = int | float | bool | str
Value = Scalar | list[int] | list[float] | list[bool] | list[str]


class ValueType(IntEnum):
    """The number of a type in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Typed:
    """A value and the type that it is stored as.

    Attributes:
        kind: Of a scalar, or of an array's elements.
        value: A list is stored as an array.
    """

    kind: ValueType
    value: Value


def uint32(value: int) -> Typed:
    """Return an unsigned number, the usual type of sizes and counts."""
    return Typed(ValueType.UINT32, value)


def float32(value: float) -> Typed:
    """Return a float32 number."""
    return Typed(ValueType.FLOAT32, value)


def text(value: str) -> Typed:
    """Return a string."""
    return Typed(ValueType.STRING, value)


def boolean(value: bool) -> Typed:
    """Return a truth value."""
    return Typed(ValueType.BOOL, value)


def texts(value: list[str]) -> Typed:
    """Return an array of strings."""
    return Typed(ValueType.STRING, value)


def int32s(value: list[int]) -> Typed:
    """Return an array of signed numbers."""
    return Typed(ValueType.INT32, value)


def string_bytes(value: str) -> bytes:
    """Return a string with its length in front."""
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def value_bytes(typed: Typed) -> bytes:
    """Return a value with its type in front."""
    kind, value = typed.kind, typed.value
    if isinstance(value, list):
        head = struct.pack("<IIQ", ValueType.ARRAY, kind, len(value))
        if kind is ValueType.STRING:
            return head + b"".join(string_bytes(str(v)) for v in value)
        return head + struct.pack(f"<{len(value)}{FORMATS[kind]}", *value)
    head = struct.pack("<I", kind)
    if kind is ValueType.STRING:
        return head + string_bytes(str(value))
    return head + struct.pack(f"<{FORMATS[kind]}", value)
