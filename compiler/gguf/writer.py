"""GGUF files, written one tensor at a time: what is in memory is the header and the tensor at hand."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from bitwright.compiler.errors import InternalError
from bitwright.compiler.gguf.bit_planes import Bytes
from bitwright.compiler.gguf.types import TensorType
from bitwright.compiler.gguf.values import ALIGNMENT, MAGIC, VERSION, Typed, string_bytes, value_bytes


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written.

    Attributes:
        name: At most 63 bytes, what ggml has room for.
        kind: How it is stored.
        shape: Outermost dimension first, as numpy counts; rows are the last dimension.
    """

    name: str
    kind: TensorType
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the file, without padding."""
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])


def aligned(size: int, alignment: int = ALIGNMENT) -> int:
    """Return the next multiple of the alignment."""
    return -(-size // alignment) * alignment


def write_gguf(
    file: BinaryIO,
    metadata: Mapping[str, Typed],
    tensors: Sequence[PlannedTensor],
    data_of: Callable[[PlannedTensor], Bytes],
) -> int:
    """Write a file of version 3, little endian, aligned to 32 bytes.

    Args:
        file: Open for writing, empty.
        metadata: Values by key, in the order in which they are written.
        tensors: What follows, in this order.
        data_of: Called once for each tensor, in order; returns its rows as :func:`~.rounding.quantize` does.

    Returns:
        Bytes written.
    """
    size = file.write(_header(metadata, tensors))
    for tensor in tensors:
        data = data_of(tensor)
        if data.nbytes != tensor.bytes:
            msg = f"tensor '{tensor.name}' has {data.nbytes} bytes, {tensor.bytes} were planned"
            raise InternalError(msg)
        size += file.write(data.tobytes())
        size += file.write(bytes(aligned(data.nbytes) - data.nbytes))
    return size


def _header(metadata: Mapping[str, Typed], tensors: Sequence[PlannedTensor]) -> bytes:
    """Return all that precedes the first tensor's data, padded."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [string_bytes(key) + value_bytes(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        if len(tensor.name.encode()) > 63 or not tensor.kind.fits(tensor.shape[-1]):
            msg = f"tensor '{tensor.name}' of shape {tensor.shape} cannot be stored as {tensor.kind.name}"
            raise InternalError(msg)
        dims = tuple(reversed(tensor.shape))
        parts.append(string_bytes(tensor.name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.kind.number, offset))
        offset = aligned(offset + tensor.bytes)
    header = b"".join(parts)
    return header + bytes(aligned(len(header)) - len(header))
