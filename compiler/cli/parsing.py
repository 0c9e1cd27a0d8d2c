"""Option values that need more than a type."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

from bitwright.compiler.errors import UsageError


def parse_drop(text: str | None) -> float | None:
    """Return a relative drop: ``0.5%`` and ``0.005`` are the same.

    Raises:
        UsageError: It is no number, or not between 0 and 1.
    """
    if text is None:
        return None
    number, percent = text.strip().removesuffix("%").strip(), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        what = f"'{text}' is not a share"
        raise UsageError(what, where="--max-drop", fix="write 0.5% or 0.005") from None
    if not math.isfinite(value) or not 0 <= value <= 1:
        what = f"'{text}' is not a share between 0 and 1"
        fix = f"did you mean {number}%?" if not percent and 1 < value <= 100 else "write 0.5% or 0.005"
        raise UsageError(what, where="--max-drop", fix=fix)
    return value


def parse_dims(entries: Iterable[str]) -> dict[str, int]:
    """Return the sizes of ``NAME=SIZE`` entries.

    Raises:
        UsageError: An entry has another form, or a name comes twice with different sizes.
    """
    dims: dict[str, int] = {}
    for entry in entries:
        name, equals, size = entry.rpartition("=")
        # int() takes "1_0" and other scripts' digits, which nobody means here.
        if (
            not equals
            or not name
            or not (size.isascii() and size.isdigit())
            or len(size) > 9
            or int(size) < 1
        ):
            what = f"'{entry}' is not NAME=SIZE with a positive whole number"
            raise UsageError(what, where="--dim", fix="e.g. --dim batch=1")
        if dims.setdefault(name, int(size)) != int(size):
            what = f"'{name}' has two sizes, {dims[name]} and {size}"
            raise UsageError(what, where="--dim", fix="an artifact has one size: leave one out")
    return dims


def check_place(path: Path, option: str) -> None:
    """Check that something can be created at ``path``, before hours of work and without creating anything.

    Raises:
        UsageError: A part of the path is a file, or its folder cannot be written.
    """
    place = Path(os.path.abspath(path)).parent  # noqa: PTH100 - not resolved: messages show what was typed
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        what = f"'{place}' is not a folder"
        raise UsageError(what, where=f"{option} {path}", fix="choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        what = f"'{place}' cannot be written"
        raise UsageError(
            what, where=f"{option} {path}", fix="choose another place, or ask for the permission"
        )
