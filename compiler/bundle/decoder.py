"""Generating with a compiled decoder: pieces of a prompt, then token after token, over caches that stay in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.bundle.bundle import LIBRARY_FOLDER, Bundle
from bitwright.compiler.bundle.native import NativeModel
from bitwright.compiler.errors import DataError, UsageError

# What a call costs beside its rows, in rows: all weights are read once.
CALL_ROWS = 4


class CompiledDecoder:
    """A decoder that was compiled with ``--context``, and the tokens that its caches hold.

    Args:
        bundle: The output folder, or what :meth:`Bundle.open` made of it.
        threads: Threads of a call; None: the profile's cores.

    Attributes:
        length: Tokens that it has seen.
        capacity: Tokens that its caches hold.
        vocabulary: Number of tokens.
        cached: It is given new tokens only; always true.

    Raises:
        UsageError: The bundle is damaged, or was compiled without ``--context``.
        ToolchainError: Its library cannot be executed in this process.
    """

    cached = True

    def __init__(self, bundle: str | Path | Bundle, threads: int | None = None) -> None:
        found = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        rules = found.rules
        if rules is None or rules.cache is None:
            what = "the artifact keeps no caches"
            raise UsageError(what, where=str(found.path), fix="compile the decoder with --context POSITIONS")
        self._sizes = rules.buckets[rules.cache.length]
        self._dtype = np.dtype(rules.inputs[0].dtype)
        self.capacity, self.length = rules.cache.capacity, 0
        vocabulary = rules.outputs[0].dims[-1]
        assert isinstance(vocabulary, int), "a table of embeddings has a size"
        self.vocabulary = vocabulary
        self._model = NativeModel(found.path / LIBRARY_FOLDER, threads)

    def restart(self, length: int = 0) -> None:
        """Forget all tokens but the first ``length``.

        Raises:
            DataError: There are not so many.
        """
        if not 0 <= length <= self.length:
            what = f"{length} of {self.length} tokens cannot be kept"
            raise DataError(what, where="restart")
        self.length = length

    def feed(self, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.floating]:
        """Give the decoder further tokens: a prompt, or the token that was chosen.

        Args:
            tokens: At least one.

        Returns:
            Logits of what follows the last of them, float32, shape (vocabulary,).

        Raises:
            DataError: A token is none of the model's, or the caches have no room; nothing was computed then.
        """
        return np.array(self._fed(tokens)[-1][-1])

    def logits(self, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.floating]:
        """Give the decoder further tokens, as :meth:`feed`; return the logits behind each, (tokens, vocabulary)."""
        return np.concatenate(self._fed(tokens, copy=True))

    def close(self) -> None:
        """Free the library and the caches."""
        self._model.close()

    def _fed(self, tokens: Sequence[int] | NDArray[np.integer], *, copy: bool = False) -> list[np.ndarray]:
        array = np.asarray(tokens, self._dtype).reshape(1, -1)
        self._check(array)
        found = []
        for size in pieces(array.shape[1], self._sizes):
            part, array = array[:, :size], array[:, size:]
            (logits, *_) = self._model.run([part, np.array([self.length], np.int32)])
            self.length += part.shape[1]
            found.append(logits[0].copy() if copy else logits[0])
        return found

    def _check(self, tokens: np.ndarray) -> None:
        count = tokens.size
        if count == 0 or self.length + count > self.capacity:
            what = f"{count} tokens behind {self.length}, where the caches hold {self.capacity}"
            raise DataError(
                what,
                where="tokens",
                fix="give at least one, and restart(), or compile with a larger --context",
            )
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            what = (
                f"token {tokens.min() if tokens.min() < 0 else tokens.max()} is none of the {self.vocabulary}"
            )
            raise DataError(what, where="tokens", fix="give the tokens of the model's own tokenizer")


def pieces(count: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return how many tokens each call takes, so that the functions that serve them have the fewest rows.

    Args:
        count: Tokens, at least one.
        sizes: Rows of the functions, ascending; fewer tokens than rows are padded.
    """
    largest = sizes[-1]
    whole = (largest,) * ((count - 1) // largest)
    best: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    for rest in range(1, count - len(whole) * largest + 1):
        holding = next(size for size in sizes if size >= rest)
        ways = [(size, best[max(0, rest - size)]) for size in sizes if size <= holding]
        best.append(min((size + CALL_ROWS + cost, (min(size, rest), *plan)) for size, (cost, plan) in ways))
    return whole + best[-1][1]
