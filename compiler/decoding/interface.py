"""Which input of a decoder holds tokens, which are caches, and which output holds the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from bitwright.compiler.decoding.ports import Port
from bitwright.compiler.errors import DataError, ModelError

# Both are integers like the tokens; only these names, which all exporters use, tell them apart.
MASK, POSITIONS = "attention_mask", "position_ids"
TOKENS, LOGITS = "input_ids", "logits"
FIX = (
    "a decoder takes token numbers [batch, length] and, if it has a cache, tensors [batch, heads, past, width]; "
    "it gives logits [batch, length, vocabulary]"
)


@dataclass(frozen=True)
class Interface:
    """What a decoder takes and gives.

    Attributes:
        tokens: Input of token numbers, integers [batch, length].
        logits: Output, [batch, length, vocabulary].
        caches: Inputs that hold keys and values of earlier tokens.
        mask: ``attention_mask`` [batch, past + length], or None.
        positions: ``position_ids`` [batch, length], or None.
    """

    tokens: Port
    logits: Port
    caches: tuple[Port, ...]
    mask: Port | None = None
    positions: Port | None = None

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens, if the model states it."""
        return _fixed(self.logits, -1)

    @property
    def length(self) -> int | None:
        """How many tokens one call takes; None: any number."""
        return _fixed(self.tokens, 1)

    def check_tokens(self, tokens: Sequence[int] | np.ndarray, where: str) -> None:
        """Refuse tokens that the model does not have.

        Raises:
            DataError: A number is negative, or not below the vocabulary.
        """
        most = self.vocabulary
        limit = np.iinfo(np.int64).max if most is None else most
        if len(tokens) == 0 or (np.min(tokens) >= 0 and np.max(tokens) < limit):
            return
        wrong = next(token for token in tokens if not 0 <= token < limit)
        what = f"token {wrong} is none of the model's {most} tokens"
        raise DataError(what, where=where, fix="give the tokenizer, or the tokens, that belong to the model")

    def feeds(self, tokens: np.ndarray, past: int = 0) -> dict[str, np.ndarray]:
        """Return the inputs of one call without those of the cache.

        Args:
            tokens: Token numbers, shape (batch, length).
            past: Tokens that are in the cache.
        """
        batch, length = tokens.shape
        found = {self.tokens.name: np.ascontiguousarray(tokens, self.tokens.dtype)}
        if self.mask is not None:
            found[self.mask.name] = np.ones((batch, past + length), self.mask.dtype)
        if self.positions is not None:
            order = np.arange(past, past + length, dtype=self.positions.dtype)
            found[self.positions.name] = np.tile(order, (batch, 1))
        return found

    def empty_caches(self) -> dict[str, np.ndarray]:
        """Return caches of one sequence that hold no token yet."""
        return {port.name: np.zeros(_empty_shape(port), port.dtype) for port in self.caches}


def find_interface(inputs: Sequence[Port], outputs: Sequence[Port]) -> Interface:
    """Find out how a decoder is called.

    Raises:
        ModelError: It is no decoder, or it cannot be told what its inputs and outputs are; the message names them.
    """
    named = {port.name: port for port in inputs}
    mask, positions = named.get(MASK), named.get(POSITIONS)
    others = [port for port in inputs if port is not mask and port is not positions]
    tokens = _tokens(others)
    caches = tuple(port for port in others if port is not tokens)
    for port in caches:
        _check_cache(port)
    found = Interface(tokens, _logits(outputs), caches, mask, positions)
    for extra in (mask, positions):
        if extra is not None and (extra.rank != 2 or extra.dtype is None):
            _refuse(f"input {extra} is no matrix of numbers")
    if _fixed(tokens, 0) not in (None, 1):
        _refuse(
            f"input {tokens} takes several sequences at once", "export it with a batch of one, or of any size"
        )
    return found


def _fixed(port: Port, axis: int) -> int | None:
    size = None if port.dims is None else port.dims[axis]
    return size if isinstance(size, int) else None


def _is(port: Port, kinds: str, rank: int) -> bool:
    return port.dtype is not None and port.dtype.kind in kinds and port.rank == rank


def _tokens(inputs: Sequence[Port]) -> Port:
    return _only(inputs, "iu", 2, TOKENS, "input holds token numbers (inputs")


def _logits(outputs: Sequence[Port]) -> Port:
    return _only(outputs, "fV", 3, LOGITS, "output can be the logits (outputs")


def _only(ports: Sequence[Port], kinds: str, rank: int, name: str, what: str) -> Port:
    """Return the port of a kind and rank; of several the one of the usual name."""
    found = [port for port in ports if _is(port, kinds, rank)]
    if len(found) > 1:
        found = [port for port in found if port.name == name]
    if not found:
        given = ", ".join(str(port) for port in ports) or "none"
        _refuse(f"not a decoder: no single {what}: {given})")
    return found[0]


def _check_cache(port: Port) -> None:
    if port.dtype is None or port.dims is None or port.rank != 4 or port.dtype.kind not in "fViu":
        _refuse(f"input {port} is nothing that a decoder takes")
    if port.dims[0] not in (1, None) and not isinstance(port.dims[0], str):
        _refuse(f"the cache {port} holds several sequences", "export it with a batch of one, or of any size")
    open_axes = [d for d in port.dims[1:] if not isinstance(d, int)]
    if len(open_axes) != 1:
        what = "has a fixed length" if not open_axes else "leaves more than its length open"
        _refuse(f"the cache {port} {what}", "export it with caches whose length alone varies")


def first_hidden(mask: np.ndarray) -> list[int] | None:
    """Return the index of the first element of a mask that is not 1, or None if no position is hidden."""
    hidden = np.argwhere(mask != 1)
    return [int(i) for i in hidden[0]] if len(hidden) else None


def length_axis(port: Port) -> int:
    """Return the axis of a cache along which tokens lie."""
    assert port.dims is not None, "caches have been checked"
    return next(axis for axis, dim in enumerate(port.dims) if axis and not isinstance(dim, int))


def _empty_shape(port: Port) -> tuple[int, ...]:
    assert port.dims is not None, "caches have been checked"
    return (1, *(dim if isinstance(dim, int) else 0 for dim in port.dims[1:]))


def _refuse(what: str, fix: str = FIX) -> NoReturn:
    raise ModelError(what, fix=fix)
