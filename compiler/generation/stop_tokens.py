"""The tokens that end a text, as the files beside a model name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitwright.compiler.errors import DataError
from bitwright.compiler.hugging_face.json_file import read_object
from bitwright.compiler.ingest.tokenizer import Tokenizer

GENERATION_CONFIG, TOKENIZER_CONFIG = "generation_config.json", "tokenizer_config.json"
FIX = "correct the file, or remove it"


def stop_tokens(folder: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Return the tokens that end a text; none if no file names one.

    generation_config.json says them by number. Without it tokenizer_config.json says one by its text, which needs the
    tokenizer.

    Args:
        folder: Where the files are.
        tokenizer: The model's.

    Raises:
        ModelError: A file is damaged.
        DataError: A file names something else than a token.
    """
    path = folder / GENERATION_CONFIG
    if path.is_file():
        entry = read_object(path).get("eos_token_id")
        if entry is not None:
            return _numbers(entry, path)
    path = folder / TOKENIZER_CONFIG
    if path.is_file() and tokenizer is not None:
        return _named(read_object(path).get("eos_token"), tokenizer, path)
    return frozenset()


def _numbers(entry: Any, path: Path) -> frozenset[int]:
    found = entry if isinstance(entry, list) else [entry]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in found):
        what = f"'eos_token_id' is {entry!r}, no token number or list of them"
        raise DataError(what, where=str(path), fix=FIX)
    return frozenset(found)


def _named(entry: Any, tokenizer: Tokenizer, path: Path) -> frozenset[int]:
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is None:
        return frozenset()
    number = tokenizer.number(text) if isinstance(text, str) else None
    if number is None:
        what = f"'eos_token' is {entry!r}, which is no token of {tokenizer.path.name}"
        raise DataError(what, where=str(path), fix=FIX)
    return frozenset([number])
