"""Reads .npz files lazily and bounded: no array is inflated before its header fits the budget."""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from bitwright.compiler.errors import DataError
from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.text import one_line, quoted, size

_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    OSError,
    struct.error,
)


@dataclass(frozen=True)
class Member:
    """One array of an .npz file, known by its header only.

    Attributes:
        file: Name of the member inside the archive.
        shape: Shape of the array.
        dtype: Element type.
        fortran: Elements are in column-major order.
        start: Offset of the first element inside the member.
    """

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int

    @property
    def bytes(self) -> int:
        """Inflated size of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive; whatever is wrong with its bytes while it is read becomes a DataError.

    Raises:
        DataError: It is not a zip archive, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _DAMAGED as error:
        fix = "write the file again with numpy.savez"
        what = f"is not a readable .npz file: {one_line(error)}"
        raise DataError(what, where=str(path), fix=fix) from error


def headers(archive: zipfile.ZipFile, path: Path, limits: Limits) -> dict[str, Member]:
    """Read the header of every array.

    Raises:
        DataError: Too many arrays, one too large, one of Python objects, or a header that disagrees with the
        archive.
    """
    entries = archive.infolist()
    if len(entries) > limits.npz_members:
        what = f"holds {len(entries)} arrays, more than {limits.npz_members}"
        raise DataError(what, where=str(path), fix="write one array for each input, with the samples stacked")
    found: dict[str, Member] = {}
    for entry in entries:
        name = entry.filename.removesuffix(".npy")
        where = f"{path}: array {quoted(name)}"
        if name in found:
            what = "is in the file twice"
            raise DataError(what, where=where, fix="write the file again with numpy.savez")
        found[name] = _header(archive, entry, where, limits)
    return found


def _header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str, limits: Limits) -> Member:
    again = "write the file again with numpy.savez"
    with archive.open(entry) as stream:
        magic = stream.read(8)
        width = {b"\x01": 2, b"\x02": 4}.get(magic[6:7])
        if magic[:6] != b"\x93NUMPY" or width is None:
            what = "is not a numpy array of a plain type"
            raise DataError(what, where=where, fix=again)
        prefix = stream.read(width)
        length = int.from_bytes(prefix, "little")
        if length > limits.npy_header_bytes:
            what = f"has a header of {size(length)}"
            raise DataError(what, where=where, fix=again)
        text = io.BytesIO(prefix + stream.read(length))
    read = np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(text)
    except Exception as error:  # numpy parses it as Python text, which fails in many ways
        what = f"has an unreadable header: {one_line(error)}"
        raise DataError(what, where=where, fix=again) from error
    if dtype.hasobject or dtype.fields is not None:
        what = f"holds {'Python objects' if dtype.hasobject else 'records'}, not numbers (dtype {dtype})"
        raise DataError(what, where=where, fix="convert it to an array of numbers before saving it")
    member = Member(entry.filename, tuple(shape), dtype, fortran, 8 + width + length)
    if any(d < 0 for d in shape) or member.bytes > limits.npz_member_bytes:
        what = f"shape {list(shape)} of {dtype} means {size(max(member.bytes, 0))}"
        fix = f"the limit for one array is {size(limits.npz_member_bytes)}; use a folder of .npz files"
        raise DataError(what, where=where, fix=fix)
    if entry.file_size != member.start + member.bytes:
        what = f"shape {list(shape)} of {dtype} needs {member.bytes} bytes, the archive holds another number"
        raise DataError(what, where=where, fix=again)
    return member


def whole(archive: zipfile.ZipFile, member: Member) -> np.ndarray:
    """Read one array."""
    with archive.open(member.file) as stream:
        _exactly(stream, member.start)
        flat = np.frombuffer(_exactly(stream, member.bytes), member.dtype)
    return flat.reshape(member.shape, order="F" if member.fortran else "C")


def rows(archive: zipfile.ZipFile, member: Member) -> Iterator[np.ndarray]:
    """Yield ``array[0]``, ``array[1]``, ... one at a time in memory (a column-major array is read whole)."""
    if member.fortran:
        yield from whole(archive, member)
        return
    row = member.shape[1:]
    count = math.prod(row) * member.dtype.itemsize
    with archive.open(member.file) as stream:
        _exactly(stream, member.start)
        for _ in range(member.shape[0]):
            yield np.frombuffer(_exactly(stream, count), member.dtype).reshape(row)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        message = "the archive is cut off"
        raise EOFError(message)
    return data
