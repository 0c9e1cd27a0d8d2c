"""Option values that need more than a type."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bitwright.compiler.errors import UsageError, nearest

# Of a name's 255 bytes, what the names of files beside it leave: .NAME.plan.yaml.tmp-1234567.
LONGEST_NAME = 200


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


def parse_dynamic(entry: str | None) -> tuple[str | None, int | None]:
    """Return the dimension of ``NAME`` or ``NAME=SIZE``, and its largest size.

    Raises:
        UsageError: It has another form.
    """
    if entry is None:
        return None, None
    name, equals, size = entry.rpartition("=")
    if not equals:
        return entry, None
    if not name or not (size.isascii() and size.isdigit()) or len(size) > 9 or int(size) < 1:
        what = f"'{entry}' is not NAME or NAME=SIZE with a positive whole number"
        raise UsageError(what, where="--dynamic", fix="e.g. --dynamic T=512")
    return name, int(size)


def parse_buckets(entries: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the sizes of ``NAME=SIZE,SIZE,...`` entries, ascending and each once.

    Raises:
        UsageError: An entry has another form, or a name comes twice.
    """
    buckets: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        name, _, sizes = entry.rpartition("=")
        words = [word.strip() for word in sizes.split(",")]
        if not name or not all(w.isascii() and w.isdigit() and len(w) <= 9 and int(w) > 0 for w in words):
            what = f"'{entry}' is not NAME=SIZE,SIZE,... with positive whole numbers"
            raise UsageError(what, where="--bucket", fix="e.g. --bucket T=16,32,64")
        if name in buckets:
            what = f"'{name}' has two lists of buckets"
            raise UsageError(what, where="--bucket", fix="write them as one list")
        buckets[name] = tuple(sorted({int(word) for word in words}))
    return buckets


def parse_pads(entries: Iterable[str]) -> dict[str, float]:
    """Return the values of ``INPUT=VALUE`` entries.

    Raises:
        UsageError: An entry has another form, or an input comes twice.
    """
    pads: dict[str, float] = {}
    for entry in entries:
        name, _, value = entry.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            what = f"'{entry}' is not INPUT=VALUE with a number"
            raise UsageError(what, where="--pad", fix="e.g. --pad attention_mask=0")
        if pads.setdefault(name, number) != number:
            what = f"input '{name}' is padded with two values"
            raise UsageError(what, where="--pad", fix="leave one out")
    return pads


_UNITS = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "size": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30},
    "energy": {"j": 1.0, "mj": 1e-3, "uj": 1e-6, "nj": 1e-9},
}
_UNITS["ram"] = _UNITS["size"]
_UNITS |= {name: {"": 1.0} for name in ("loss", "bits", "fps", "luts", "ffs", "dsps", "brams")}
# Circuits can do without these.
_MAY_BE_NONE = ("dsps", "brams")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(?:[eE]-[0-9]+)?\s*([A-Za-z]*)")


def parse_budget(entries: Iterable[str]) -> dict[str, float]:
    """Return the bounds of e.g. ``latency=8ms,size=2MB,ram=512KB,energy=1mJ`` in seconds, bytes, joules and numbers.

    Raises:
        UsageError: An unknown quantity or unit, no number, or a quantity that comes twice.
    """
    budget: dict[str, float] = {}
    for entry in (part.strip() for text in entries for part in text.split(",")):
        name, equals, amount = entry.partition("=")
        if not equals or name not in _UNITS:
            what = (
                f"'{entry}' is not one of latency=8ms, size=2MB, ram=512KB, energy=1mJ, bits=4.5, loss=0.1, fps=100, "
                "luts=30000, ffs=30000, dsps=100, brams=100"
            )
            raise UsageError(what, where="--budget", fix=nearest(name, tuple(_UNITS)))
        if name in budget:
            what = f"'{name}' comes twice"
            raise UsageError(what, where="--budget", fix="leave one out")
        budget[name] = _quantity(name, amount.strip())
    return budget


def _quantity(name: str, amount: str) -> float:
    units = _UNITS[name]
    found = _QUANTITY.fullmatch(amount)
    if found is None or found[2].lower() not in units:
        what = f"'{amount}' is not a number with a unit of {name}"
        raise UsageError(
            what, where="--budget", fix=f"units: {', '.join(units)}, e.g. {name}=8{next(iter(units))}"
        )
    value = float(found[1]) * units[found[2].lower()]
    if value <= 0 and name not in _MAY_BE_NONE:
        what = f"{name} must be more than nothing"
        raise UsageError(what, where="--budget", fix="write a positive number")
    return value


def check_place(path: Path, option: str) -> None:
    """Check that something can be created at ``path``, before hours of work and without creating anything.

    Raises:
        UsageError: A part of the path is a file, its folder cannot be written, or the name is too long.
    """
    place = Path(os.path.abspath(path)).parent  # noqa: PTH100 - not resolved: messages show what was typed
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        what = f"'{place}' is not a folder"
        raise UsageError(what, where=f"{option} {path}", fix="choose another place")
    if max(len(os.fsencode(part)) for part in (*path.parts, "")) > LONGEST_NAME:
        what = f"a name has more than {LONGEST_NAME} bytes, and files beside it have longer ones"
        raise UsageError(what, where=f"{option} {str(path)[:LONGEST_NAME]}...", fix="choose a shorter name")
    try:
        # A file without a name. What os.access says is not true of every file system.
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        what = f"'{place}' cannot be written: {error.strerror}"
        fix = "choose another place, or ask for the permission"
        raise UsageError(what, where=f"{option} {path}", fix=fix) from error
