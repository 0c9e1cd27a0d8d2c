"""Decoding in ONNX Runtime: one call for the prompt, one for each token, the cache handed from call to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bitwright.compiler.decoding.interface import Interface
from bitwright.compiler.errors import DataError
from bitwright.compiler.ingest.text import one_line
from bitwright.compiler.ort.session import ORT_ERRORS

# A longer prompt is fed in pieces: a model gives logits behind every token, with 128 thousand tokens 512 kB for each.
PIECE = 512
Logits = NDArray[np.floating]


class DecodingSession:
    """A decoder and the tokens it has seen.

    A graph with a cache is given new tokens only, one at a time if it takes no more; its present tensors become the
    past of the next call without being copied. A graph without one is given all tokens anew in every call.

    Args:
        session: An open session.
        interface: Its inputs and outputs.
        pairs: Cache input -> the output that is its next value; empty without a cache.
        context: The most tokens that the model takes, or None if nobody knows.

    Attributes:
        length: Tokens that it has seen.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        interface: Interface,
        pairs: Mapping[str, str],
        context: int | None = None,
    ) -> None:
        self._session, self._interface, self._pairs = session, interface, dict(pairs)
        self._context = context
        self._outputs = [interface.logits.name, *self._pairs.values()]
        self._past: dict[str, ort.OrtValue] = {}
        self._tokens: list[int] = []
        self.restart()

    @property
    def cached(self) -> bool:
        """Whether the graph has a cache."""
        return bool(self._pairs)

    @property
    def length(self) -> int:
        """Tokens that it has seen."""
        return len(self._tokens)

    def restart(self) -> None:
        """Forget all tokens."""
        self._tokens = []
        empty = self._interface.empty_caches()
        self._past = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in empty.items()}

    def feed(self, tokens: Sequence[int]) -> Logits:
        """Give the decoder further tokens.

        Args:
            tokens: At least one.

        Returns:
            Logits of what follows the last of them, shape (vocabulary,).

        Raises:
            DataError: A token is none of the model's, there are more than it takes, or it fails; it has seen as many
                as before then, or as many whole pieces of a long prompt as it took.
        """
        assert len(tokens) > 0, "something is fed"
        if self._context is not None and self.length + len(tokens) > self._context:
            what = f"{len(tokens)} tokens behind {self.length}, where the model takes {self._context}"
            raise DataError(what, where="tokens", fix="give fewer, or restart with a shorter text")
        self._interface.check_tokens(tokens, f"tokens {self.length} to {self.length + len(tokens) - 1}")
        size = len(tokens) if not self.cached else self._interface.length or PIECE
        for start in range(0, len(tokens), size):
            logits = self._call(list(tokens[start : start + size]))
        return logits

    def _call(self, tokens: list[int]) -> Logits:
        seen = self._tokens + tokens
        given, past = (tokens, self.length) if self.cached else (seen, 0)
        arrays = self._interface.feeds(np.asarray(given, np.int64)[None], past)
        feeds = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        try:
            values = self._session.run_with_ort_values(self._outputs, feeds | self._past)
        except ORT_ERRORS as error:
            what = f"the model fails with {len(given)} tokens behind {past}: {one_line(error)}"
            fix = "generate fewer tokens: the model may not reach further; or run it in ONNX Runtime first"
            raise DataError(what, where=f"token {len(seen) - 1}", fix=fix) from error
        found: Logits = values[0].numpy()
        if found.shape[0] != 1 or found.shape[1] not in (
            1,
            len(given),
        ):  # some models give the last token's alone
            what = f"the logits of {len(given)} tokens behind {past} have shape {list(found.shape)}"
            fix = "generate fewer tokens: the model may not reach further"
            raise DataError(what, where=f"token {len(seen) - 1}", fix=fix)
        self._past = dict(zip(self._pairs, values[1:], strict=True))
        self._tokens = seen
        logits: Logits = found[0, -1]
        return logits
