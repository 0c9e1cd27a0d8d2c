"""JSON that nobody vouches for: sizes and doubled keys are checked before anybody looks at the values."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from bitwright.compiler.errors import ModelError

LARGEST_JSON = 16 << 20


def check_regular(path: Path, largest: int | None = None) -> int:
    """Return the size of a regular file, links followed as Hugging Face's cache has them.

    Raises:
        ModelError: There is none, it is something else, or it is larger than ``largest`` bytes.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        msg = f"cannot be read: {reason}"
        raise ModelError(msg, where=str(path), fix="give a complete folder of a model") from None
    if not stat.S_ISREG(found.st_mode):
        msg = "is not a regular file"
        raise ModelError(msg, where=str(path), fix="give a complete folder of a model")
    if largest is not None and found.st_size > largest:
        msg = f"has {found.st_size} bytes; at most {largest} are read"
        raise ModelError(msg, where=str(path), fix="this is no file of this kind; get it anew")
    return found.st_size


def read_object(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        ModelError: It cannot be read, is too large, too deep, no object, or names a key twice.
    """
    check_regular(path, largest)
    try:
        data = path.read_bytes()
    except OSError as error:
        msg = f"cannot be read: {error.strerror}"
        raise ModelError(msg, where=str(path), fix="check its permissions") from None
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Return the object that a JSON text is.

    Args:
        data: UTF-8.
        where: For messages.

    Raises:
        ModelError: It is no object, not JSON as the standard has it, too deep, or names a key twice.
    """
    try:
        text = data.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        _refuse(f"is not JSON: {error}", where)
    if not isinstance(found, dict):
        _refuse("is no JSON object", where)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        doubled = counts.most_common(1)[0][0]
        msg = f"the key '{doubled}' comes twice"
        raise ValueError(msg)
    return found


def _no_constant(name: str) -> NoReturn:
    msg = f"{name} is no number of JSON"
    raise ValueError(msg)


def _refuse(what: str, where: str) -> NoReturn:
    raise ModelError(what, where=where, fix="the file is damaged or made to hurt; get it anew") from None
