"""Streams of tokens as a user names them: an array of an .npz file, or a text and its tokenizer, cut into windows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.decoding.perplexity import DEFAULT_WINDOW, Windows
from bitwright.compiler.errors import DataError, UsageError, nearest
from bitwright.compiler.ingest import npz
from bitwright.compiler.ingest.limits import DEFAULT_LIMITS, Limits
from bitwright.compiler.ingest.text import one_line, quoted, size
from bitwright.compiler.ingest.tokenizer import Tokenizer, tokenizer_beside

TEXT_ENDINGS = (".txt", ".md")
BYTES_PER_TOKEN = "bytes_per_token"  # noqa: S105 - the name of an array
OPTIONS = ("window", "stride", "windows", "tokenizer")
GRAMMAR = "e.g. tokens.npz:test,window=256 or text.txt,tokenizer=tokenizer.json"
LARGEST_TEXT = 1 << 30


@dataclass(frozen=True)
class TokenSource:
    """What a user named.

    Attributes:
        text: As it was written.
        path: The file.
        array: For an .npz file: name of the array; None: the only stream in it.
        tokenizer: For a text: tokenizer.json; None: the one beside the text.
        windows: How the stream is cut.
    """

    text: str
    path: Path
    array: str | None
    tokenizer: Path | None
    windows: Windows


@dataclass(frozen=True)
class TokenStream:
    """Tokens in the order of a text.

    Attributes:
        tokens: Shape (tokens,), int64.
        bytes_per_token: Bytes of text a token stands for on average, or None.
    """

    tokens: NDArray[np.int64]
    bytes_per_token: float | None = None


def is_text(path: Path) -> bool:
    """Tell whether a file holds text, by its name."""
    return path.suffix in TEXT_ENDINGS


def parse_token_source(text: str, window: int = DEFAULT_WINDOW) -> TokenSource:
    """Read ``FILE[:ARRAY][,window=N][,stride=N][,windows=N][,tokenizer=FILE]``.

    Args:
        text: What the user wrote.
        window: Tokens of a window unless ``text`` names another number.

    Raises:
        UsageError: It has another form.
    """
    head, *entries = text.split(",")
    options: dict[str, str] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        if name not in OPTIONS or not value or name in options:
            what = (
                f"'{entry}' is no option, or stands there twice" if value else f"'{entry}' is not NAME=VALUE"
            )
            raise UsageError(what, where=text, fix=f"{nearest(name, OPTIONS)}; {GRAMMAR}")
        options[name] = value
    file, colon, array = head.rpartition(":")
    if not colon or not file.endswith(".npz"):
        file, array = head, ""
    if not file:
        what = "names no file of tokens"
        raise UsageError(what, where=text, fix=GRAMMAR)
    numbers = {name: _number(options[name], name, text) for name in options if name != "tokenizer"}
    cut = Windows(numbers.get("window", window), numbers.get("stride"), numbers.get("windows"))
    tokenizer = Path(options["tokenizer"]) if "tokenizer" in options else None
    return TokenSource(text, Path(file), array or None, tokenizer, cut)


def _number(value: str, name: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", value):
        what = f"'{name}={value}' is no number"
        raise UsageError(what, where=where, fix=f"e.g. {name}=256")
    return int(value)


def read_stream(source: TokenSource, limits: Limits = DEFAULT_LIMITS) -> TokenStream:
    """Read all tokens.

    Raises:
        UsageError: There is no such file.
        DataError: The file holds no stream of tokens, or several and none is named.
        ToolchainError: A text needs the package ``tokenizers``, which is not installed.
    """
    if not source.path.is_file():
        what = f"there is no file {quoted(str(source.path))}"
        raise UsageError(what, where=source.text, fix=GRAMMAR)
    if source.path.suffix == ".npz":
        if source.tokenizer is not None:
            what = "an .npz file holds token numbers: there is nothing for a tokenizer to do"
            raise UsageError(what, where=source.text, fix="leave ,tokenizer= out")
        return _from_npz(source, limits)
    return _from_text(source)


def holds_streams(path: Path, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Tell whether all arrays of an .npz file that are no scalars are streams of tokens.

    Raises:
        DataError: The file is damaged.
    """
    with npz.opened(path) as archive:
        found = npz.headers(archive, path, limits)
    arrays = [member for member in found.values() if member.shape]
    return bool(arrays) and all(_is_stream(member) for member in arrays)


def _is_stream(member: npz.Member) -> bool:
    return len(member.shape) == 1 and member.dtype.kind in "iu"


def _from_npz(source: TokenSource, limits: Limits) -> TokenStream:
    with npz.opened(source.path) as archive:
        found = npz.headers(archive, source.path, limits)
    names = [name for name, member in found.items() if _is_stream(member)]
    name = source.array
    if name is None and len(names) == 1:
        name = names[0]
    if name is None:
        what = "holds no stream of tokens: an integer array with one axis"
        fix = f"save one: numpy.savez({source.path.name!r}, tokens=...)"
        if names:
            what = f"holds several streams of tokens: {', '.join(map(quoted, names))}"
            fix = f"name one: {source.path}:{names[0]}"
        raise DataError(what, where=str(source.path), fix=fix)
    if name not in names:
        what = f"holds no stream of tokens {quoted(name)}: an integer array with one axis"
        raise DataError(what, where=str(source.path), fix=nearest(name, names))
    with npz.opened(source.path) as archive:
        tokens = npz.whole(archive, found[name]).astype(np.int64)
        scalar = found.get(BYTES_PER_TOKEN)
        ratio = float(npz.whole(archive, scalar)) if scalar is not None and scalar.shape == () else None
    if ratio is not None and not 0 < ratio < np.inf:
        what = f"{ratio} bytes a token"
        raise DataError(what, where=f"{source.path}: array '{BYTES_PER_TOKEN}'", fix="leave the array out")
    return TokenStream(tokens, ratio)


def _from_text(source: TokenSource) -> TokenStream:
    path = source.path
    place = source.tokenizer or tokenizer_beside(path)
    if place is None:
        what = "a text needs a tokenizer, and there is no tokenizer.json beside it"
        raise UsageError(what, where=source.text, fix="add ,tokenizer=FILE.json")
    tokenizer = Tokenizer(place)
    if path.stat().st_size > LARGEST_TEXT:
        what = f"has {size(path.stat().st_size)}, more than {size(LARGEST_TEXT)}"
        raise DataError(what, where=str(path), fix="give a smaller text")
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as UTF-8 text: {one_line(error)}"
        raise DataError(what, where=str(path), fix="give a text, or tokens in an .npz file") from error
    tokens = tokenizer.encode_plain(text)
    ratio = len(text.encode()) / len(tokens) if len(tokens) else None
    return TokenStream(tokens, ratio)
