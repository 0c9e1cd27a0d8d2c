"""A plug-in of qemu's user-mode emulator that counts instructions and code blocks, and what it writes.

Its source is part of the package and is compiled once, for this machine. A count is a fact about the emulated program,
the same every time; it is no time.
"""

from __future__ import annotations

import platform
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.toolchain.cache import cache_folder
from bitwright.targets.toolchain.linker import find_driver

SOURCE = Path(__file__).with_name("block_counter.c")
INSTRUCTION_BYTES = 4


@dataclass(frozen=True)
class Block:
    """A piece of code that is executed from its start to its end.

    Attributes:
        file: Name of the file it was mapped from, without folders; empty for generated code.
        offset: Its position in that file.
        code: The instructions, 4 bytes each.
    """

    file: str
    offset: int
    code: bytes

    @property
    def instructions(self) -> int:
        """Number of instructions."""
        return len(self.code) // INSTRUCTION_BYTES


@dataclass(frozen=True)
class Count:
    """What was executed.

    Attributes:
        instructions: Of the whole process, or of one inference.
        blocks: Executions of every block; empty unless asked for.
        marks: Number of a mark that the program set -> instructions executed before it.
    """

    instructions: float
    blocks: Mapping[Block, float]
    marks: Mapping[int, int] = field(default_factory=dict)

    def within(self, file: str) -> float:
        """Return the instructions executed in one file."""
        return sum(block.instructions * times for block, times in self.blocks.items() if block.file == file)


def plugin() -> Path:
    """Return the compiled plug-in, compiling it the first time.

    Raises:
        ToolchainError: No C compiler for this machine, or it failed.
    """
    source = SOURCE.read_bytes()
    library = cache_folder("plugins") / f"block_counter-{sha256(source).hexdigest()[:16]}.so"
    if not library.exists():
        driver = find_driver(f"{platform.machine()}-linux-gnu")
        with tempfile.TemporaryDirectory(dir=library.parent) as work:
            built = Path(work, library.name)
            flags = ["-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,--allow-shlib-undefined"]
            driver.run([*driver.command, *flags, str(SOURCE), "-o", str(built)], f"compiling {SOURCE.name}")
            built.replace(library)
    return library


def read_counts(file: Path) -> Count:
    """Read what the plug-in wrote.

    Raises:
        ToolchainError: It wrote nothing, or the file is damaged.
    """
    try:
        (_, total), *rows = [line.split(maxsplit=4) for line in file.read_text().splitlines()]
        blocks, maps, marks = (
            [row[1:] for row in rows if row[0] == kind] for kind in ("block", "map", "mark")
        )
        return Count(int(total), _located(blocks, maps), {int(k): int(count) for k, count in marks})
    except (OSError, ValueError, IndexError) as error:
        msg = f"the counts cannot be read: {error}"
        raise ToolchainError(
            msg, where=str(file), fix="use qemu 6 to 8, whose plug-ins have version 1"
        ) from error


def _located(blocks: Iterable[list[str]], mappings: Iterable[list[str]]) -> Mapping[Block, float]:
    maps = sorted((int(a, 16), int(b, 16), int(o, 16), Path(name).name) for a, b, o, name in mappings)
    starts = [first for first, *_ in maps]
    found: Counter[Block] = Counter()
    for text, times, code in blocks:
        address = int(text, 16)
        index = bisect_right(starts, address) - 1
        first, last, offset, name = maps[index] if index >= 0 else (0, 0, 0, "")
        inside = first <= address < last
        block = Block(name if inside else "", address - first + offset if inside else 0, bytes.fromhex(code))
        found[block] += int(times)
    return found
