"""Section sizes of a 32-bit little-endian ELF file."""

from __future__ import annotations

import struct
from pathlib import Path

from bitwright.compiler.errors import ToolchainError

SECTION_BYTES = 40
IN_MEMORY, NO_BITS = 2, 8  # SHF_ALLOC, SHT_NOBITS


def loaded_sections(path: Path) -> dict[str, int]:
    """Return section -> bytes of every section whose content is in the file and goes into memory.

    Raises:
        ToolchainError: It is no such ELF file.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x01\x01":
        msg = "the linker wrote no 32-bit little-endian ELF file"
        raise ToolchainError(msg, where=path.name)
    (table,) = struct.unpack_from("<I", data, 32)
    count, names_index = struct.unpack_from("<HH", data, 48)
    headers = [struct.unpack_from("<10I", data, table + SECTION_BYTES * k) for k in range(count)]
    names = headers[names_index][4]
    found: dict[str, int] = {}
    for name, kind, flags, _, _, size, *_ in headers:
        if flags & IN_MEMORY and kind != NO_BITS and size:
            start = names + name
            label = data[start : data.index(b"\0", start)].decode()
            found[label] = found.get(label, 0) + size
    return found
