"""External tensor data: a model may read files of its own folder, and nothing else.

The rules are those of ONNX's own reader after its path traversal advisories: canonical containment, no
symbolic link, no hard link, no special file, known keys only, and every offset and length checked against the
file before a read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from bitwright.compiler.graph.mapped import MappedFile, read_range
from bitwright.compiler.ingest.detach import Detached
from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.protos import Body, body_tensors
from bitwright.compiler.ingest.tensor_checks import tensor_bytes
from bitwright.compiler.ingest.text import quoted, refused, size

ALLOWED_KEYS = ("location", "offset", "length", "checksum")
INSIDE = "keep the data file in the model's folder and name it by a relative path"
# Windows has neither flag; containment and the link count are checked there all the same.
_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)


@dataclass(frozen=True)
class ExternalFile:
    """A data file that the model reads.

    Attributes:
        location: As the model names it.
        path: Canonical path.
        bytes: Size when it was checked.
        sha1: Checksum the model claims for it, lower case, or "".
    """

    location: str
    path: Path
    bytes: int
    sha1: str


@contextmanager
def open_contained(path: Path) -> Iterator[int]:
    """Open a data file that was found to be contained; yields a descriptor.

    Raises:
        OSError: The last part of the path became a symbolic link, or it is no longer a regular file.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            message = f"{path} is not a regular file with one link"
            raise OSError(message)
        yield descriptor
    finally:
        os.close(descriptor)


def check_external_data(
    found: list[Body], folder: Path, detached: Detached, file: str, limits: Limits
) -> tuple[ExternalFile, ...]:
    """Check every external tensor and give each its explicit offset and length, in place.

    Args:
        found: The bodies of the model.
        folder: Folder of the model file.
        detached: Knows the tensors whose data are in the model file itself; they are not external.
        file: Model file, for messages.
        limits: Budgets.

    Returns:
        The data files, ordered by location.

    Raises:
        ModelError: Names the tensor and the rule.
    """
    files: dict[str, ExternalFile] = {}
    nested = 0
    for body in found:
        for tensor, part in body_tensors(body):
            if detached.span(tensor) is not None:
                continue
            if tensor.data_location != TensorProto.EXTERNAL:
                if tensor.external_data:
                    raise refused(file, part, "has external data but is not marked as external", INSIDE)
                continue
            entries = _entries(tensor, part, file)
            location = entries["location"]
            if location not in files:
                files[location] = _contained(location, entries.get("checksum", ""), folder, part, file)
            _check_range(tensor, entries, files[location], part, file)
            nested += tensor_bytes(tensor) if body.place else 0
    total = sum(f.bytes for f in {f.path: f for f in files.values()}.values())
    if total > limits.external_bytes or nested > limits.nested_external_bytes:
        what = f"external data of {size(total)}, {size(nested)} of it inside control flow or functions"
        fix = f"at most {size(limits.external_bytes)} and {size(limits.nested_external_bytes)} are allowed"
        raise refused(file, "", what, fix)
    return tuple(files[name] for name in sorted(files))


def _entries(tensor: onnx.TensorProto, part: str, file: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in ALLOWED_KEYS:
            fix = f"only {', '.join(ALLOWED_KEYS)} are defined; export the model again"
            raise refused(file, part, f"its external data has the unknown key {quoted(entry.key)}", fix)
        if entry.key in entries:
            raise refused(file, part, f"its external data has two entries {entry.key}", "keep one")
        entries[entry.key] = entry.value
    if not entries.get("location"):
        raise refused(file, part, "its external data has no location", INSIDE)
    if tensor.HasField("raw_data"):
        raise refused(file, part, "has external data and data in the file", "keep one of them")
    return entries


def _contained(location: str, checksum: str, folder: Path, part: str, file: str) -> ExternalFile:
    shown = quoted(location)
    if "\0" in location or Path(location).is_absolute() or re.match(r"[A-Za-z]:|[\\/]", location):
        raise refused(file, part, f"external data location {shown} is not a relative path", INSIDE)
    if ".." in re.split(r"[\\/]", location):
        raise refused(file, part, f"external data location {shown} leaves the model's folder", INSIDE)
    root = folder.resolve()
    plain = Path(os.path.normpath(root / location))
    try:
        real = plain.resolve()
        if real != plain:
            raise refused(file, part, f"external data {shown} is reached through a symbolic link", INSIDE)
        if not real.is_relative_to(root):
            raise refused(file, part, f"external data location {shown} leaves the model's folder", INSIDE)
        found = os.lstat(real)
    except (OSError, ValueError) as error:
        what = f"external data file {shown} cannot be found ({type(error).__name__})"
        raise refused(file, part, what, "copy the data file into the model's folder") from None
    if not stat.S_ISREG(found.st_mode):
        raise refused(file, part, f"external data {shown} is not a regular file", INSIDE)
    if found.st_nlink > 1:
        fix = "copy the data file, so that it has no second name elsewhere"
        raise refused(file, part, f"external data file {shown} has {found.st_nlink} hard links", fix)
    return ExternalFile(location, real, found.st_size, checksum.lower())


def _check_range(
    tensor: onnx.TensorProto, entries: dict[str, str], data: ExternalFile, part: str, file: str
) -> None:
    needed = tensor_bytes(tensor)
    numbers = {"offset": 0, "length": needed}
    for key in numbers:
        text = entries.get(key)
        if text is None:
            continue
        if not re.fullmatch(r"[0-9]{1,19}", text):
            what = f"{key} of its external data is {quoted(text)}, not a non-negative number"
            raise refused(file, part, what, "export the model again; the file is damaged or hostile")
        numbers[key] = int(text)
    offset, length = numbers["offset"], numbers["length"]
    if length != needed:
        what = f"dimensions {list(tensor.dims)} need {needed} bytes, its external data has length {length}"
        raise refused(file, part, what, "export the model again; dimensions and length must agree")
    if offset + length > data.bytes:
        shown = quoted(data.location)
        what = f"needs bytes {offset}..{offset + length} of {shown}, which has {data.bytes} bytes"
        raise refused(file, part, what, "copy the whole data file; this one is cut off")
    del tensor.external_data[:]
    for key, value in (("location", data.location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def map_contained(path: Path) -> MappedFile:
    """Map a data file that was found to be contained.

    Raises:
        OSError: See :func:`open_contained`; or the file cannot be mapped.
    """
    with open_contained(path) as descriptor:
        return MappedFile(os.fdopen(os.dup(descriptor), "rb"))


def digest_into(sha256: hashlib._Hash, data: ExternalFile, file: str) -> None:
    """Add a data file to a running SHA-256, and compare it with the checksum the model claims.

    Raises:
        ModelError: The claimed SHA-1 differs, or the file changed since it was checked.
    """
    claimed = hashlib.sha1(usedforsecurity=False) if data.sha1 else None
    with open_contained(data.path) as descriptor:
        for piece in read_range(descriptor, 0, data.bytes):
            sha256.update(piece)
            if claimed is not None:
                claimed.update(piece)
    if claimed is not None and claimed.hexdigest() != data.sha1:
        what = f"its SHA-1 is {claimed.hexdigest()}, the model expects {quoted(data.sha1)}"
        fix = "copy the data file again, or export the model again"
        raise refused(file, f"external data {quoted(data.location)}", what, fix)
