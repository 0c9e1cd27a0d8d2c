"""How names and sizes that come from a file are put into messages."""

from __future__ import annotations

from bitwright.compiler.errors import ModelError, printable

LONGEST = 96


def quoted(name: str) -> str:
    """Return a name in quotes, on one line, control characters escaped, the middle left out if it is long."""
    text = str(name)
    if not text.isprintable():
        text = printable(text).replace("\n", "\\n")
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 4 :]} ({len(name)} characters)"
    return f"'{text}'"


def one_line(message: object, longest: int = 400) -> str:
    """Return a library's message as one line, without its stack frames, shortened at the end."""
    text = " ".join(printable(message).split())
    return text if len(text) <= longest else f"{text[:longest]}..."


def size(count: float) -> str:
    """Return a number of bytes for people, e.g. ``2.0 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def refused(file: str, part: str, what: str, fix: str) -> ModelError:
    """Return the error for a broken rule in ``part`` (a node, a tensor, or "" for all) of a model."""
    return ModelError(what, where=f"{file}: {part}" if part else file, fix=fix)
