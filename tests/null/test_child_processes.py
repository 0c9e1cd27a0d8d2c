"""What passes between a process and its child: errors that stay what they are, answers within a time."""

from __future__ import annotations

import json
import os

import pytest

from bitwright.compiler import errors
from bitwright.compiler.errors import BitwrightError, InternalError, ToolchainError, from_record, to_record
from bitwright.targets.toolchain.process import LineReader, ToolCrashError

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, BitwrightError)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_an_error_arrives_as_it_was(kind: type[BitwrightError]) -> None:
    sent = kind("the rule", where="the place", fix="the way out")
    got = from_record(json.loads(json.dumps(to_record(sent))))
    assert (type(got), got.message, got.exit_code) == (kind, sent.message, kind.exit_code)


def test_a_class_of_another_module_arrives_as_the_one_it_extends() -> None:
    got = from_record(to_record(ToolCrashError("ended by SIGSEGV", 11, where="linking")))
    assert (type(got), got.what) == (ToolchainError, "ended by SIGSEGV")


@pytest.mark.parametrize("name", ["Mapping", "nearest", "NoSuchError", "__builtins__"])
def test_what_is_no_error_of_ours_is_a_bug(name: str) -> None:
    assert type(from_record({"class": name, "what": "w", "where": "", "fix": ""})) is InternalError


def test_lines_arrive_whole_however_they_were_written() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream:
        reader = LineReader(stream)
        os.write(writing, b"one\ntwo\nthr")
        assert [reader.line(1.0), reader.line(1.0)] == [b"one", b"two"]
        with pytest.raises(TimeoutError, match=r"0\.01 s"):
            reader.line(0.01)
        os.write(writing, b"ee\n")
        assert reader.line(1.0) == b"three"
        os.write(writing, b"cut short")
        os.close(writing)
        with pytest.raises(EOFError):
            reader.line(1.0)
