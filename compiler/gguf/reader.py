"""Reading GGUF files that nobody vouches for: every count is checked against the bytes that are left."""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import ModelError, nearest
from bitwright.compiler.gguf.rounding import dequantize
from bitwright.compiler.gguf.types import BY_NUMBER, TYPES, TensorType
from bitwright.compiler.gguf.values import ALIGNMENT, FORMATS, MAGIC, Typed, Value, ValueType

VERSIONS = (2, 3)
LARGEST_ALIGNMENT = 1 << 16
KNOWN_KINDS = frozenset(int(kind) for kind in ValueType)


@dataclass(frozen=True)
class Caps:
    """What a file may hold; one beyond is refused.

    Attributes:
        header_bytes: Everything before the first tensor's data.
        entries: Metadata entries.
        tensors: Tensors.
        key_bytes: Length of a key.
        string_bytes: Length of a string value.
        elements: Elements of all arrays together; as Python values they take ten times their bytes.
        name_bytes: Length of a tensor's name.
        dimensions: Dimensions of a tensor.
    """

    header_bytes: int = 1 << 27
    entries: int = 1 << 16
    tensors: int = 1 << 17
    key_bytes: int = (1 << 16) - 1
    string_bytes: int = 1 << 24
    elements: int = 1 << 22
    name_bytes: int = 63
    dimensions: int = 4


DEFAULT_CAPS = Caps()


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: Unique.
        kind: How it is stored.
        shape: Outermost dimension first, as numpy counts.
        offset: Of its first byte in the file.
        bytes: Its size.
    """

    name: str
    kind: TensorType
    shape: tuple[int, ...]
    offset: int
    bytes: int

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


class GgufFile:
    """An open file; use it as a context manager.

    Attributes:
        path: The file.
        version: 2 or 3.
        metadata: Values by key.
        tensors: Tensors by name, in the file's order.
    """

    def __init__(self, path: Path, caps: Caps = DEFAULT_CAPS) -> None:
        """Map the file and read its header.

        Raises:
            ModelError: It is no GGUF file, is cut off or contradicts itself; the message names the place.
        """
        self.path = path
        self._map = _mapped(path)
        try:
            header = _Header(self._map, path, caps)
            self.version, self.metadata, self.tensors = header.version, header.metadata, header.tensors
        except BaseException:
            self._map.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._map.close()

    def value(self, key: str, kind: type) -> Value:
        """Return a metadata value of a Python type.

        Raises:
            ModelError: It is missing, or of another type.
        """
        found = self.metadata.get(key)
        if found is None:
            msg = f"the metadata have no '{key}'"
            raise ModelError(msg, where=str(self.path), fix=nearest(key, list(self.metadata)))
        if not isinstance(found.value, kind) or isinstance(found.value, bool) is not (kind is bool):
            msg = f"'{key}' is {type(found.value).__name__}, not {kind.__name__}"
            raise ModelError(msg, where=str(self.path))
        return found.value

    def stored(self, name: str) -> NDArray[np.uint8]:
        """Return a copy of a tensor's bytes, uint8, shape (rows, bytes of a row)."""
        tensor = self._tensor(name)
        data = np.frombuffer(self._map, np.uint8, tensor.bytes, tensor.offset)
        return data.reshape(-1, tensor.kind.row_bytes(tensor.shape[-1])).copy()

    def array(self, name: str) -> NDArray[np.float32]:
        """Return a tensor as float32.

        Raises:
            ModelError: There is no such tensor, or it holds NaN or infinity.
        """
        tensor = self._tensor(name)
        values = dequantize(self.stored(name), tensor.kind).reshape(tensor.shape)
        if not np.isfinite(values).all():
            msg = f"tensor '{name}' holds NaN or infinity"
            raise ModelError(msg, where=f"{self.path}: offset {tensor.offset}")
        return values

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            msg = f"there is no tensor '{name}'"
            raise ModelError(msg, where=str(self.path), fix=nearest(name, list(self.tensors)))
        return self.tensors[name]


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < len(MAGIC) + 20:
                msg = "too short to be a GGUF file"
                raise ModelError(msg, where=str(path), fix="give a complete .gguf file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        msg = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ModelError(msg, where=str(path), fix="give a .gguf file") from error


class _Header:
    """Reads a header from its start to its end; ``_at`` is where the next byte is."""

    def __init__(self, data: mmap.mmap, path: Path, caps: Caps) -> None:
        self._data, self._path, self._caps = data, path, caps
        self._at, self._size = 0, len(data)
        self._elements_left = caps.elements
        if self._take(4) != MAGIC:
            self._wrong("no GGUF file: it does not start with 'GGUF'", 0)
        self.version = self._number("I")
        if self.version not in VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", self.version))[0]
            kind = "a big-endian file" if swapped in VERSIONS else f"version {self.version}"
            self._wrong(f"{kind} is not supported; versions 2 and 3, little endian, are", 4)
        tensors = self._count(caps.tensors, 24, "tensors")
        entries = self._count(caps.entries, 13, "metadata entries")
        self.metadata = self._metadata(entries)
        alignment = self._alignment()
        found = [self._tensor() for _ in range(tensors)]
        start = -(-self._at // alignment) * alignment
        self.tensors = self._placed(found, start, alignment)

    def _wrong(self, what: str, at: int | None = None) -> NoReturn:
        place = self._at if at is None else at
        fix = "the file is damaged or made to hurt; get it anew"
        raise ModelError(what, where=f"{self._path}: offset {place}", fix=fix) from None

    def _take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > self._size - self._at:
            self._wrong(f"{count} bytes are announced, {self._size - self._at} are left")
        if self._at + count > self._caps.header_bytes:
            self._wrong(f"the header is longer than {self._caps.header_bytes} bytes")
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def _number(self, code: str) -> int:
        found: int = struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]
        return found

    def _count(self, limit: int, least_bytes: int, what: str) -> int:
        """Return a count of things that take at least so many bytes each."""
        at, count = self._at, self._number("Q")
        if count > limit or count * least_bytes > self._size - self._at:
            self._wrong(f"{count} {what} are more than the file can hold, or than {limit}", at)
        return count

    def _string(self, limit: int, what: str) -> str:
        at, length = self._at, self._number("Q")
        if length > limit:
            self._wrong(f"{what} of {length} bytes; at most {limit} are read", at)
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError:
            self._wrong(f"{what} is not UTF-8", at)

    def _kind(self) -> ValueType:
        at, number = self._at, self._number("I")
        if number not in KNOWN_KINDS:
            self._wrong(f"unknown metadata type {number}", at)
        return ValueType(number)

    def _metadata(self, entries: int) -> dict[str, Typed]:
        found: dict[str, Typed] = {}
        for _ in range(entries):
            at, key = self._at, self._string(self._caps.key_bytes, "a key")
            if not key or key in found:
                self._wrong(f"the key '{key}' is empty or comes twice", at)
            kind = self._kind()
            found[key] = self._array() if kind is ValueType.ARRAY else Typed(kind, self._values(kind, 1)[0])
        return found

    def _array(self) -> Typed:
        at, kind = self._at, self._kind()
        if kind is ValueType.ARRAY:
            self._wrong("an array of arrays is not supported", at)
        least = 8 if kind is ValueType.STRING else struct.calcsize(f"<{FORMATS[kind]}")
        count = self._count(self._elements_left, least, "elements")
        self._elements_left -= count
        return Typed(kind, self._values(kind, count))

    def _values(self, kind: ValueType, count: int) -> list[int] | list[float] | list[bool] | list[str]:
        if kind is ValueType.STRING:
            return [self._string(self._caps.string_bytes, "a string") for _ in range(count)]
        at, code = self._at, FORMATS[kind]
        values = list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))
        if kind is ValueType.BOOL:
            if not set(values) <= {0, 1}:
                self._wrong("a truth value is neither 0 nor 1", at)
            return [bool(v) for v in values]
        return values

    def _alignment(self) -> int:
        entry = self.metadata.get("general.alignment", Typed(ValueType.UINT32, ALIGNMENT))
        value = entry.value
        if entry.kind is not ValueType.UINT32 or not isinstance(value, int):
            return self._wrong("general.alignment is no uint32")
        if not 8 <= value <= LARGEST_ALIGNMENT or value & (value - 1):
            self._wrong(f"general.alignment is {value}, not a power of two from 8 to {LARGEST_ALIGNMENT}")
        return value

    def _tensor(self) -> tuple[int, StoredTensor]:
        """Return a tensor whose offset still counts from the start of the data, and where it is described."""
        at, name = self._at, self._string(self._caps.name_bytes, "a tensor's name")
        count = self._number("I")
        if not 1 <= count <= self._caps.dimensions:
            self._wrong(f"tensor '{name}' has {count} dimensions, not 1 to {self._caps.dimensions}", at)
        dims = [self._number("Q") for _ in range(count)]
        number, offset = self._number("I"), self._number("Q")
        kind = BY_NUMBER.get(number)
        if kind is None:
            known = ", ".join(t.name for t in TYPES)
            self._wrong(f"tensor '{name}' has type {number}; these are read: {known}", at)
        if not all(0 < d <= self._size * 8 for d in dims) or not kind.fits(dims[0]):
            self._wrong(f"tensor '{name}' cannot have dimensions {dims} as {kind.name}", at)
        size = math.prod(dims[1:]) * kind.row_bytes(dims[0])
        return at, StoredTensor(name, kind, tuple(reversed(dims)), offset, size)

    def _placed(
        self, found: list[tuple[int, StoredTensor]], start: int, alignment: int
    ) -> dict[str, StoredTensor]:
        """Return the tensors with offsets in the file, all of them within it and none over another."""
        placed: dict[str, StoredTensor] = {}
        for at, t in found:
            if t.name in placed:
                self._wrong(f"tensor '{t.name}' comes twice", at)
            if t.offset % alignment or start + t.offset + t.bytes > self._size:
                what = f"tensor '{t.name}' ({t.bytes} bytes at {t.offset}) is not aligned or ends beyond the file"
                self._wrong(what, at)
            placed[t.name] = StoredTensor(t.name, t.kind, t.shape, start + t.offset, t.bytes)
        order = sorted(placed.values(), key=lambda t: t.offset)
        for first, second in pairwise(order):
            if first.offset + first.bytes > second.offset:
                self._wrong(f"tensors '{first.name}' and '{second.name}' overlap", second.offset)
        return placed
