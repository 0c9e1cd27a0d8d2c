"""Text as it comes: what is certain of it after each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a decoder of bytes writes for the beginning of a character whose end is in a later token.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text piece by piece; the pieces together are the text of all tokens.

    A character may lie in several tokens, and a token's text may depend on the one before it (leading blanks), so a few
    tokens are decoded again each time, never all.

    Args:
        decode: Tokens -> text.
        before: Tokens that the text follows; their own text is not given.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(before)[-8:]
        self._known = decode(self._context) if self._context else ""
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """Return the text that a further token makes certain, perhaps none."""
        self._new.append(token)
        whole = self._decode([*self._context, *self._new])
        if whole.endswith(INCOMPLETE):
            return ""
        return self._settle(whole)

    def rest(self) -> str:
        """Return what is left at the end: a character that was never completed."""
        return self._settle(self._decode([*self._context, *self._new])) if self._new else ""

    def _settle(self, whole: str) -> str:
        piece = whole[len(self._known) :]
        self._context = self._new or self._context
        self._known, self._new = self._decode(self._context), []
        return piece
