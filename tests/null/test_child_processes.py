"""What passes between a process and its child: errors that stay what they are, answers within a time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from bitwright.compiler import errors
from bitwright.compiler.errors import BitwrightError, InternalError, ToolchainError, from_record, to_record
from bitwright.targets.toolchain.process import LineReader, ToolCrashError, run_tool

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


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that was killed and waits to be reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes from /proc")
def test_what_a_tool_started_ends_with_it(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    script = f"sleep 60 & echo $! > {noted}; wait"
    start = time.monotonic()
    with pytest.raises(ToolchainError, match=r"did not finish in 0\.5 s"):
        run_tool(("sh", "-c", script), what="waiting", timeout_s=0.5)
    assert time.monotonic() - start < 30, "the grandchild, which holds the pipes, was waited for"
    grandchild = int(noted.read_text())
    deadline = time.monotonic() + 10
    while alive(grandchild) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(grandchild)


def test_a_tool_that_ends_in_time_gives_its_output_and_its_status() -> None:
    assert run_tool(("sh", "-c", "echo $0 done"), what="saying", timeout_s=60) == "sh done\n"
    both = ("sh", "-c", "echo one; echo two >&2; echo three")
    assert run_tool(both, what="saying", timeout_s=60) == "one\nthree\n"
    assert run_tool(both, what="saying", timeout_s=60, errors_too=True) == "one\ntwo\nthree\n"
    with pytest.raises(ToolchainError, match=r"failed with status 3\nwrong"):
        run_tool(("sh", "-c", "echo wrong >&2; exit 3"), what="failing", timeout_s=60)
    with pytest.raises(ToolchainError, match=r"failed with status 3\nwrong"):
        run_tool(("sh", "-c", "echo wrong >&2; exit 3"), what="failing", timeout_s=60, errors_too=True)
    with pytest.raises(ToolCrashError, match="SIGTERM"):
        run_tool(("sh", "-c", "kill -TERM $$"), what="dying", timeout_s=60)
    with pytest.raises(ToolchainError, match="cannot start 'no-such-tool-anywhere'"):
        run_tool(("no-such-tool-anywhere",), what="starting", timeout_s=60)
