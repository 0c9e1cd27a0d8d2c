"""Files and folders that appear whole or not at all, whatever interrupts the writer."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil

from bitwright.compiler.errors import UsageError

STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}


def sync_file(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until a folder and everything below it is on the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(root, name))
        sync_file(Path(root))


def sibling(target: Path, kind: str) -> Path:
    """Return the hidden name beside ``target`` that this process uses for ``kind`` (``tmp`` or ``old``)."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}")


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _abandoned(target: Path, kind: str) -> list[Path]:
    """Return the siblings left by processes that no longer run, or by an earlier one of this number."""
    stem = f".{target.name}.{kind}-"
    found = [p for p in target.parent.iterdir() if p.name.startswith(stem) and p.name[len(stem) :].isdigit()]
    numbers = {p: int(p.name[len(stem) :]) for p in found}
    return [p for p, number in numbers.items() if number == os.getpid() or not psutil.pid_exists(number)]


def recover(target: Path) -> None:
    """Clean up after writers of ``target`` that were killed.

    An unfinished ``tmp`` is deleted. An ``old`` is the complete previous output: it is put back if the writer
    was killed between moving it aside and moving the new one in.
    """
    for path in _abandoned(target, "old"):
        if target.exists():
            remove(path)
        else:
            path.rename(target)
    for path in _abandoned(target, "tmp"):
        remove(path)


def replace_folder(new: Path, target: Path) -> None:
    """Move the finished folder ``new`` to ``target``; an existing one is removed after that."""
    aside = sibling(target, "old")
    had_old = target.exists()
    if had_old:
        target.rename(aside)
    new.rename(target)
    sync_file(target.parent)
    if had_old:
        shutil.rmtree(aside)


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a missing permission into an error that a user understands."""
    try:
        yield
    except OSError as error:
        if error.errno not in STORAGE_ERRORS:
            raise
        msg = f"cannot write the output: {error.strerror}; nothing was left behind"
        raise UsageError(
            msg,
            where=str(target),
            fix="free some space or choose another place",
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see either the old content or all of the new one.

    Args:
        path: The file; its folder is created if needed.
        data: The whole content.

    Raises:
        UsageError: The disk is full or the place cannot be written.
    """
    with open_atomically(path) as file:
        file.write(data)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends without an error, and not before.

    Args:
        path: The file; its folder is created if needed.

    Raises:
        UsageError: The disk is full or the place cannot be written.
    """
    path = Path(os.path.realpath(path))
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        temporary = sibling(path, "tmp")
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_file(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
