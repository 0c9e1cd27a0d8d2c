"""Text piece by piece: the pieces together are the text of all tokens, and none ends within a character."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from bitwright.compiler.generation.text_stream import INCOMPLETE, TextStream


def bytes_text(tokens: Sequence[int]) -> str:
    """Decode tokens that are bytes, as byte-level tokenizers do."""
    return bytes(tokens).decode("utf-8", errors="replace")


def words_text(tokens: Sequence[int]) -> str:
    """Decode tokens that are words, whose leading blank the first of a text loses."""
    return "".join(f" w{token}" for token in tokens)[1:]


def pieces(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [*(stream.add(token) for token in tokens), stream.rest()]


@given(st.text(max_size=30), st.text(max_size=10))
def test_pieces_of_bytes_are_the_text(text: str, before: str) -> None:
    found = pieces(TextStream(bytes_text, before.encode()), text.encode())
    assert "".join(found) == text
    if INCOMPLETE not in text:
        assert not any(INCOMPLETE in piece for piece in found)


@given(st.lists(st.integers(0, 99), max_size=12), st.lists(st.integers(0, 99), min_size=1, max_size=12))
def test_blanks_between_words_are_kept(tokens: list[int], before: list[int]) -> None:
    found = "".join(pieces(TextStream(words_text, before), tokens))
    assert found == words_text([*before, *tokens])[len(words_text(before)) :]


@given(st.binary(max_size=20))
def test_bytes_that_are_no_text_come_at_the_end(data: bytes) -> None:
    assert "".join(pieces(TextStream(bytes_text), data)) == bytes_text(data)


def test_a_character_comes_with_its_last_byte() -> None:
    stream = TextStream(bytes_text, b"x")
    assert [stream.add(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
