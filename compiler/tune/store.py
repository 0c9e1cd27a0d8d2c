"""A file of tuning records that any number of processes share and that no crash can spoil.

Lines of JSON rather than a database: an append is one write under a lock, so it needs no journal; a line that a
crash cut short fails its checksum and costs itself alone; stores are merged with ``cat`` and read with any tool.
SQLite's write-ahead log would need shared memory beside the file, which network file systems do not offer.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bitwright.compiler.errors import UsageError
from bitwright.compiler.tune.records import Key, Record, dump_line, load_line
from bitwright.targets.toolchain.cache import cache_place

READING, WRITING = "cannot be read", "cannot be written"
# How a record begins, whole or torn; a file system may leave zeros after a crash.
RECORD_START = re.compile(rb"[0-9a-f]{8} \{|[0-9a-f]{0,8} ?\Z|\0")


def default_place() -> Path:
    """Return the store that is used unless another is named."""
    return cache_place("tuning") / "records.jsonl"


@dataclass(frozen=True)
class Known:
    """What a store says about one key.

    Attributes:
        trials: Choice -> its latest trial.
        finished: The best result of a search that ended; one that ended by itself beats one cut short.
    """

    trials: dict[str, Record] = field(default_factory=dict)
    finished: Record | None = None


@dataclass(frozen=True)
class Contents:
    """A store as it was read.

    Attributes:
        known: By key.
        damaged: Lines that were skipped: torn, altered, or of another format.
    """

    known: dict[Key, Known]
    damaged: int

    def of(self, key: Key) -> Known:
        """Return what is known about a key; nothing is an answer, too."""
        return self.known.get(key, Known())


class TuningStore:
    """A store of tuning records.

    Args:
        path: The file; it is created, with its folder, by the first append.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Contents:
        """Return every record. A writer may be at work: its unfinished line is no record yet.

        Raises:
            UsageError: The file cannot be read, or is something else, which nothing may be appended to.
        """
        known: dict[Key, Known] = {}
        damaged = 0
        for number, line in enumerate(self._lines()):
            if number == 0 and not RECORD_START.match(line[:10].rstrip(b"\n")):
                msg = "is no tuning store"
                raise UsageError(msg, where=str(self.path), fix="name another file with --tuning-store")
            record = load_line(line)
            if record is None:
                damaged += bool(line.strip())
                continue
            found = known.setdefault(record.key, Known())
            if record.kind == "finished":
                known[record.key] = Known(found.trials, _better(found.finished, record))
            else:
                found.trials[record.choice.label()] = record
        return Contents(known, damaged)

    def _lines(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                yield from file
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._error(READING, error) from error

    def append(self, records: Sequence[Record]) -> None:
        """Add records; when this returns they are on the disk.

        Raises:
            UsageError: The file cannot be written.
        """
        data = "".join(map(dump_line, records)).encode()
        try:
            with self._locked() as handle:
                # A line that somebody's crash left without its end must not swallow ours.
                size = os.fstat(handle).st_size
                torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
                _write_all(handle, b"\n" + data if torn else data)
                os.fsync(handle)
        except OSError as error:
            raise self._error(WRITING, error) from error

    @contextmanager
    def _locked(self) -> Iterator[int]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # given up with the handle, however the process ends
            yield handle
        finally:
            os.close(handle)

    def _error(self, what: str, error: OSError) -> UsageError:
        msg = f"the tuning store {what}: {error.strerror}"
        return UsageError(msg, where=str(self.path), fix="name another one with --tuning-store FILE")


def _better(old: Record | None, new: Record) -> Record:
    if old is None or (new.complete, -new.ratio) >= (old.complete, -old.ratio):
        return new
    return old


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
