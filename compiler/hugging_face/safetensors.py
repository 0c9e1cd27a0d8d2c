"""Reading safetensors files that nobody vouches for: the header is checked against the bytes that are there.

The format: eight bytes of the header's length, the header (JSON: name -> dtype, shape, range of bytes), the data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import ModelError, nearest
from bitwright.compiler.graph.mapped import MappedFile
from bitwright.compiler.hugging_face.json_file import check_regular, parse_object

# What numpy reads the elements as; the values of bfloat16 are the upper halves of float32's.
DTYPES: dict[str, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
METADATA = "__metadata__"
LENGTH_BYTES = 8
FIX = "the file is damaged or made to hurt; get it anew"


@dataclass(frozen=True)
class Caps:
    """What a file may hold; one beyond is refused.

    Attributes:
        header_bytes: Length of the header.
        tensors: Tensors.
        dimensions: Dimensions of a tensor.
    """

    header_bytes: int = 16 << 20
    tensors: int = 1 << 17
    dimensions: int = 8


DEFAULT_CAPS = Caps()


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: Unique in its file.
        dtype: F32, F16 or BF16.
        shape: As numpy counts.
        offset: Of its first byte in the file.
        bytes: Its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class SafetensorsFile:
    """An open file, memory-mapped.

    Attributes:
        path: The file.
        tensors: Tensors by name, in the order of their bytes.
    """

    def __init__(self, path: Path, caps: Caps = DEFAULT_CAPS) -> None:
        """Map the file and check its header.

        Raises:
            ModelError: It is no safetensors file, is cut off, contradicts itself or holds other types.
        """
        self.path = path
        check_regular(path)
        try:
            self._file = MappedFile(path.open("rb", buffering=0))
        except OSError as error:
            msg = f"cannot be read: {error.strerror or error}"
            raise ModelError(msg, where=str(path), fix="check its permissions") from None
        self.tensors = _tensors(self._file, path, caps)

    def tensor(self, name: str) -> StoredTensor:
        """Return where a tensor lies.

        Raises:
            ModelError: There is no such tensor.
        """
        if name not in self.tensors:
            msg = f"there is no tensor '{name}'"
            raise ModelError(msg, where=str(self.path), fix=nearest(name, list(self.tensors)))
        return self.tensors[name]

    def part(self, name: str, index: tuple[slice, ...] = ()) -> NDArray[np.float32]:
        """Return a tensor, or a part of it, as float32 in memory of its own.

        Args:
            name: A tensor's.
            index: What is read of each dimension, the first ones first; nothing else is converted.

        Raises:
            ModelError: It holds NaN or infinity.
        """
        tensor = self.tensor(name)
        count = math.prod(tensor.shape)
        stored = np.frombuffer(self._file.view, DTYPES[tensor.dtype], count, tensor.offset)
        values = _widened(stored.reshape(tensor.shape)[index], tensor.dtype)
        self._file.hand_out(values.nbytes)
        if not np.isfinite(values).all():
            msg = f"tensor '{name}' holds NaN or infinity"
            raise ModelError(msg, where=str(self.path), fix="get the checkpoint anew")
        return values


def _widened(stored: np.ndarray, dtype: str) -> NDArray[np.float32]:
    if dtype != "BF16":
        return stored.astype(np.float32)
    wide = stored.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _tensors(file: MappedFile, path: Path, caps: Caps) -> dict[str, StoredTensor]:
    """Return the tensors that the header describes, all within the file, none over another, none missing."""
    header, start = _header(file, path, caps)
    found = [
        _tensor(name, entry, start, f"{path}: tensor '{name}'", caps)
        for name, entry in header.items()
        if name != METADATA
    ]
    if len(found) > caps.tensors:
        _refuse(f"{len(found)} tensors; at most {caps.tensors} are read", str(path))
    found.sort(key=lambda t: (t.offset, t.bytes))
    end = start
    for tensor in found:
        if tensor.offset != end:
            what = (
                f"starts at byte {tensor.offset}, not where the one before ends ({end}): an overlap or a hole"
            )
            _refuse(what, f"{path}: tensor '{tensor.name}'")
        end = tensor.offset + tensor.bytes
    if end != file.bytes:
        _refuse(f"the tensors end at byte {end}, the file at {file.bytes}", str(path))
    return {t.name: t for t in found}


def _header(file: MappedFile, path: Path, caps: Caps) -> tuple[dict[str, Any], int]:
    """Return the header and the offset of the first byte of data."""
    if file.bytes < LENGTH_BYTES:
        _refuse("too short to be a safetensors file", str(path))
    length = struct.unpack("<Q", file.view[:LENGTH_BYTES])[0]
    if length > caps.header_bytes or length > file.bytes - LENGTH_BYTES:
        what = f"a header of {length} bytes is announced; the file has {file.bytes}, and {caps.header_bytes} are read"
        _refuse(what, f"{path}: offset 0")
    start = LENGTH_BYTES + length
    return parse_object(bytes(file.view[LENGTH_BYTES:start]), f"{path}: header"), start


def _tensor(name: str, entry: object, start: int, where: str, caps: Caps) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse("is not described by dtype, shape and data_offsets", where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        msg = f"has dtype {dtype!r}; {', '.join(DTYPES)} are read"
        raise ModelError(msg, where=where, fix="give the checkpoint that is not quantized")
    if not _sizes(shape) or len(shape) > caps.dimensions or not all(shape):
        _refuse(f"has a shape that no weight has: {str(shape)[:80]}", where)
    if not _sizes(offsets) or len(offsets) != 2:
        _refuse(f"has no two offsets: {str(offsets)[:80]}", where)
    size = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    if offsets[1] - offsets[0] != size:
        _refuse(f"takes {offsets[1] - offsets[0]} bytes; {shape} of {dtype} takes {size}", where)
    return StoredTensor(name, dtype, tuple(shape), start + offsets[0], size)


def _sizes(found: object) -> bool:
    """Tell whether this is a list of numbers that may be sizes; JSON's true is no number."""
    return isinstance(found, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in found)


def _refuse(what: str, where: str) -> NoReturn:
    raise ModelError(what, where=where, fix=FIX)
