"""Text to token numbers and back, by a tokenizer.json and the package ``tokenizers``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import DataError, ToolchainError, UsageError
from bitwright.compiler.ingest.text import one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Implementation

PACKAGE = "tokenizers"
FILE = "tokenizer.json"
LARGEST_FILE = 256 << 20


class Tokenizer:
    """A tokenizer.

    Args:
        path: tokenizer.json.

    Raises:
        UsageError: There is no such file.
        ToolchainError: The package that reads it is not installed.
        DataError: The file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            what = "there is no such file"
            raise UsageError(what, where=str(path), fix="give the model's tokenizer.json")
        if not installed():
            what = "text needs the package 'tokenizers', which is not installed"
            raise ToolchainError(
                what, where=str(path), fix="pip install 'bitwright[lm]', or pass token numbers"
            )
        self.path = path
        self._tokenizer = _read(path)

    def encode(self, text: str) -> list[int]:
        """Return token numbers, with those that the tokenizer puts before and behind every text."""
        return list(self._tokenizer.encode(text).ids)

    def encode_plain(self, text: str) -> NDArray[np.int64]:
        """Return token numbers of nothing but the text, shape (tokens,)."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token numbers; special tokens have none."""
        return str(self._tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True))

    def number(self, token: str) -> int | None:
        """Return the number of a token, or None if there is none of that text."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)


def installed() -> bool:
    """Tell whether the package that reads tokenizers is installed."""
    return find_spec(PACKAGE) is not None


def tokenizer_beside(path: Path) -> Path | None:
    """Return the tokenizer.json in the folder of a file, or None."""
    found = path.with_name(FILE)
    return found if found.is_file() else None


def _read(path: Path) -> Implementation:
    from tokenizers import Tokenizer as Implementation

    if path.stat().st_size > LARGEST_FILE:
        what = f"has {path.stat().st_size} bytes, more than {LARGEST_FILE}"
        raise DataError(what, where=str(path), fix="give the model's tokenizer.json")
    try:
        return Implementation.from_file(str(path))
    except Exception as error:  # the package raises plain exceptions
        what = f"is no tokenizer: {one_line(error)}"
        raise DataError(what, where=str(path), fix="give the model's tokenizer.json") from error
