"""Weights that stay in their file: arrays are views of a read-only mapping, bytes are read in pieces.

Resident memory grows only by the pages that an array's reader touches, and those are the page cache's, which the
system takes back when it needs memory. The mapping outlives a rename or a deletion of the file. It does not
outlive truncation: a file that is cut short in place while it is mapped ends the process (SIGBUS), as with any
mapped file. Writers here therefore never write into an existing file; see ``compiler.graph.saving``.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

PIECE_BYTES = 1 << 20
# Arrays of this many bytes may be handed out before the pages of earlier ones are let go.
RESIDENT_BYTES = 32 << 20
# The smallest element numpy can view in place; 4-bit and 2-bit elements would have to be unpacked.
_BYTE_BITS = 8


def read_range(descriptor: int, offset: int, length: int, chunk: int = PIECE_BYTES) -> Iterator[bytes]:
    """Yield a range of an open file in pieces of ``chunk`` bytes; only the last is shorter.

    Raises:
        OSError: The file became shorter than it was when it was checked.
    """
    zeros, end = bytes(chunk), offset + length
    while offset < end:
        count = min(chunk, end - offset)
        # What a sparse file does not store reads as zeros; to read it would only fill the page cache.
        piece = zeros[:count] if _is_hole(descriptor, offset, count) else _read(descriptor, offset, count)
        yield piece
        offset += count


def _is_hole(descriptor: int, offset: int, count: int) -> bool:
    if not hasattr(os, "SEEK_DATA") or os.fstat(descriptor).st_size < offset + count:
        return False
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + count
    except OSError as error:
        return error.errno == errno.ENXIO  # nothing stored up to the end of the file


def _read(descriptor: int, offset: int, count: int) -> bytes:
    os.lseek(descriptor, offset, os.SEEK_SET)
    pieces: list[bytes] = []
    while count:
        piece = os.read(descriptor, count)
        if not piece:
            message = "the file became shorter while it was read"
            raise OSError(message)
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


class MappedFile:
    """An open file, mapped read-only; closed when its last tensor is gone.

    Attributes:
        bytes: Size when it was mapped.
        view: The whole content.
    """

    def __init__(self, stream: BinaryIO) -> None:
        """Map ``stream``, which this object keeps and closes.

        Raises:
            OSError: The file cannot be mapped.
        """
        self._stream = stream
        # An empty file cannot be mapped; there is nothing to see in it either.
        empty = os.fstat(stream.fileno()).st_size == 0
        self.view: mmap.mmap | bytes = (
            b"" if empty else mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        )
        self.bytes = len(self.view)
        self._handed_out = 0

    def pieces(self, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Read a range piece by piece; the pages of the mapping are not touched.

        Raises:
            OSError: The file became shorter.
        """
        return read_range(self._stream.fileno(), offset, self.bytes - offset if length is None else length)

    def hand_out(self, length: int) -> None:
        """Account for an array of ``length`` bytes that somebody is about to read."""
        self._handed_out += length
        if self._handed_out > RESIDENT_BYTES:
            self.release_pages()
            self._handed_out = length

    def release_pages(self) -> None:
        """Let go of the pages that were touched so far; arrays stay valid and fetch them again when read."""
        if isinstance(self.view, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.view.madvise(mmap.MADV_DONTNEED)


class MappedTensor(ir.Tensor[np.ndarray]):
    """A constant that stays in its file.

    To everybody else it is an ordinary tensor in memory: ``numpy()`` is a read-only view of the mapping, which
    need not be aligned to the size of an element. Serialization reads the file instead of touching the mapping.

    Attributes:
        file: The file it is a part of.
    """

    def __init__(
        self, file: MappedFile, offset: int, dtype: ir.DataType, shape: tuple[int, ...], name: str | None
    ) -> None:
        """Describe a range of ``file`` that was checked to lie inside it.

        Args:
            file: The file.
            offset: First byte.
            dtype: Element type of at least one byte; little-endian in the file.
            shape: Dimensions.
            name: Name of the tensor.
        """
        assert dtype.bitwidth >= _BYTE_BITS, "narrower elements are packed and need a copy"
        elements = int(np.prod(shape, dtype=np.int64))
        array = (
            np.frombuffer(file.view, dtype.numpy().newbyteorder("<"), elements, offset) if elements else None
        )
        value = np.empty(0, dtype.numpy()) if array is None else array
        super().__init__(value.reshape(shape), dtype=dtype, name=name)
        self.file, self._offset = file, offset

    def numpy(self) -> np.ndarray:
        """Return a read-only view of the file; only the pages that are read take memory, and not for long."""
        self.file.hand_out(self.nbytes)
        return super().numpy()

    def pieces(self) -> Iterator[bytes]:
        """Yield the tensor's little-endian bytes, all pieces but the last a whole number of elements.

        Raises:
            OSError: The file became shorter.
        """
        return self.file.pieces(self._offset, self.nbytes)

    def tobytes(self) -> bytes:
        """Return the tensor's bytes."""
        return b"".join(self.pieces())

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor's bytes to an open file."""
        for piece in self.pieces():
            file.write(piece)


def map_weights(model: ir.Model, files: Mapping[str, MappedFile]) -> None:
    """Turn every external tensor of ``model`` into a view of its file, in place.

    Tensors whose elements are packed (4 bits and less) are copied into memory.

    Args:
        model: Every external tensor has an explicit offset and lies inside its file.
        files: Location of an external tensor -> the file.
    """
    holders: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for holder in holders:
        graphs = [*([holder] if isinstance(holder, ir.Graph) else []), *holder.subgraphs()]
        for value in (v for graph in graphs for v in graph.initializers.values()):
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _mapped(value.const_value, files)
        for node in holder.all_nodes():
            for attribute in [a for a in node.attributes.values() if not a.is_ref()]:
                if attribute.type == ir.AttributeType.TENSOR:
                    tensor = _mapped(attribute.as_tensor(), files)
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)
                elif attribute.type == ir.AttributeType.TENSORS:
                    tensors = [_mapped(t, files) for t in attribute.as_tensors()]
                    node.attributes[attribute.name] = ir.AttrTensors(attribute.name, tensors)


def release_pages(model: ir.Model) -> None:
    """Let go of the pages of mapped weights that were touched so far."""
    tensors = (v.const_value for graph in model.graphs() for v in graph.initializers.values())
    for file in {t.file for t in tensors if isinstance(t, MappedTensor)}:
        file.release_pages()


def _mapped(tensor: ir.TensorProtocol, files: Mapping[str, MappedFile]) -> ir.TensorProtocol:
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    file, offset = files[os.fspath(tensor.location)], tensor.offset or 0
    shape = tuple(int(d) for d in tensor.shape.numpy())
    if tensor.dtype.bitwidth >= _BYTE_BITS:
        return MappedTensor(file, offset, tensor.dtype, shape, tensor.name)
    data = b"".join(file.pieces(offset, tensor.nbytes))
    proto = onnx.TensorProto(name=tensor.name, data_type=tensor.dtype.value, dims=shape, raw_data=data)
    return ir.serde.deserialize_tensor(proto)
