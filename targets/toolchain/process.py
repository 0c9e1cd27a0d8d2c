"""Running an external tool: a time limit, no shell, and errors that say what happened."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

from bitwright.compiler.errors import ToolchainError

SHOWN_CHARACTERS = 2000


class ToolCrashError(ToolchainError):
    """An external tool was ended by a signal.

    Attributes:
        signal: The signal's number.
    """

    def __init__(self, what: str, number: int, *, where: str, fix: str = "") -> None:
        super().__init__(what, where=where, fix=fix)
        self.signal = number


def run_tool(
    command: Sequence[str],
    *,
    what: str,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    accepted: Collection[int] = (0,),
    errors_too: bool = False,
) -> str:
    """Run ``command`` and return its standard output.

    The tool gets a process group of its own: whatever it started ends with it when it is stopped.

    Args:
        command: Program and arguments; no shell is involved.
        what: What the tool is doing, for the error message, e.g. ``"linking model.so"``.
        timeout_s: Seconds after which the tool and all that it started are killed.
        environment: Variables added to this process's.
        folder: Where it runs; this process's own folder by default.
        accepted: Exit statuses that mean success.
        errors_too: Also return, in between, what it writes to its error stream.

    Raises:
        ToolCrashError: A signal ended it.
        ToolchainError: It is missing, ran too long or failed.
    """
    try:
        done = _finished(command, timeout_s, {**os.environ, **(environment or {})}, folder, errors_too)
    except OSError as error:
        msg = f"cannot start '{command[0]}': {error.strerror}"
        raise ToolchainError(msg, where=what) from error
    except subprocess.TimeoutExpired as error:
        msg = f"'{command[0]}' did not finish in {timeout_s:g} s"
        raise ToolchainError(msg, where=what) from error
    number = _signal_of(done.returncode)
    output = ((done.stderr or "").strip() or done.stdout.strip())[-SHOWN_CHARACTERS:]
    if number:
        name = signal.Signals(number).name
        raise ToolCrashError(f"'{command[0]}' was ended by {name}\n{output}".rstrip(), number, where=what)
    if done.returncode not in accepted:
        msg = f"'{command[0]}' failed with status {done.returncode}\n{output}"
        raise ToolchainError(msg, where=what)
    return done.stdout


def _finished(
    command: Sequence[str],
    timeout_s: float,
    environment: Mapping[str, str],
    folder: Path | None,
    joined: bool,
) -> subprocess.CompletedProcess[str]:
    """Run a program in a session of its own and collect what it writes; ``joined`` to one stream or to two."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if joined else subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        cwd=folder,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except BaseException:
            # Also on an interrupt: it reaches this process's group only. Grandchildren hold the pipes, so that
            # killing the child alone would leave them running, and ``communicate`` waiting for them.
            _kill_group(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a session's leader, which was not waited for yet, and everything in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class LineReader:
    """Reads a child's answers, a line each, with a time limit.

    Args:
        stream: The pipe's end; nothing else may read it.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._waiting = stream, b""

    def line(self, limit_s: float) -> bytes:
        """Return the next line without its end.

        Raises:
            EOFError: The other end was closed first.
            TimeoutError: There was none within ``limit_s`` seconds.
        """
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._stream, selectors.EVENT_READ)
            while b"\n" not in self._waiting:
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    msg = f"no answer in {limit_s:g} s"
                    raise TimeoutError(msg)
                data = os.read(self._stream.fileno(), 1 << 16)
                if not data:
                    raise EOFError
                self._waiting += data
        line, _, self._waiting = self._waiting.partition(b"\n")
        return line


def _signal_of(status: int) -> int:
    """Return the signal that ended a process, also when an outer program reports it as 128 + signal."""
    number = -status if status < 0 else status - 128
    return number if number in {int(s) for s in signal.Signals} else 0
