"""Contestants in processes of their own that take turns, in an order drawn anew for every round."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from bitwright.compiler.bench.entry import Clock, Entry
from bitwright.compiler.bench.statistics import Interval, ratio_of_medians
from bitwright.compiler.errors import ToolchainError, UsageError, from_record
from bitwright.targets.toolchain.process import LineReader

ROUNDS, SESSIONS, TURN_S = 10, 3, 0.04
BLOCKS, MOST_CALLS = 8, 100_000
START_S, TURN_LIMIT_S = 300.0, 600.0
LAST_LINES = 3


class Contestant:
    """A running process that measures one entry; a context manager."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.calls, self.blocks = entry, 1, BLOCKS
        self._log: TextIO = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            entry.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **entry.environment()},
        )
        assert self._process.stdout is not None
        self._answers = LineReader(self._process.stdout)

    def __enter__(self) -> Contestant:
        """Send the entry; the process loads its model meanwhile."""
        self._send(self.entry.to_json())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # a request that the process never read
                continue

    def wait_ready(self, turn_s: float) -> None:
        """Wait until the model is loaded and warm; chooses the calls of a turn of about ``turn_s`` seconds.

        Raises:
            BitwrightError: The contestant cannot be loaded.
        """
        once = max(float(self._receive(START_S)["once_s"]), 1e-7)
        self._process.send_signal(signal.SIGSTOP)
        self.calls = int(np.clip(turn_s / BLOCKS / once, 1, MOST_CALLS))
        self.blocks = int(np.clip(turn_s / once / self.calls, 3, BLOCKS))

    def turn(self) -> dict[str, Any]:
        """Measure once; as :func:`bitwright.compiler.bench.child.measure`.

        Outside its turns the process is stopped: workers of its thread pool would spin on for tens of milliseconds and
        take the processors from the next contestant.

        Raises:
            BitwrightError: The process ended or reported an error.
        """
        self._process.send_signal(signal.SIGCONT)
        self._send(json.dumps({"blocks": self.blocks, "calls": self.calls}))
        found = self._receive(TURN_LIMIT_S)
        self._process.send_signal(signal.SIGSTOP)
        return found

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error

    def _receive(self, limit_s: float) -> dict[str, Any]:
        label = self.entry.label
        try:
            record: dict[str, Any] = json.loads(self._answers.line(limit_s))
        except EOFError as error:
            raise self._died() from error
        except TimeoutError as error:
            raise ToolchainError(str(error), where=label, fix="give smaller inputs") from error
        if "error" in record:
            told = record["error"]
            raise from_record({**told, "where": f"{label}: {told['where']}" if told["where"] else label})
        return record

    def _died(self) -> ToolchainError:
        code = self._process.wait()
        self._log.seek(0)
        said = [line.strip() for line in self._log.read().splitlines() if line.strip()][-LAST_LINES:]
        end = f"signal {-code}" if code < 0 else f"exit status {code}"
        what = f"its process ended with {end}" + (f": {' / '.join(said)}" if said else "")
        return ToolchainError(what, where=self.entry.label, fix="run it alone to see why")


@dataclass(frozen=True)
class Turns:
    """What was measured.

    Attributes:
        labels: Of the contestants.
        clock: What the seconds are.
        medians: Seconds of a call [contestants, processes, rounds]: the median over the blocks of a turn.
        best: The same, the smallest block.
        preempted: Times per second of measuring that the system took the processor away.
    """

    labels: tuple[str, ...]
    clock: Clock
    medians: np.ndarray
    best: np.ndarray
    preempted: float

    def seconds(self, label: str) -> float:
        """Return the median seconds of a call."""
        return float(np.median(self.medians[self.labels.index(label)]))

    def best_seconds(self, label: str) -> float:
        """Return the smallest seconds of a call that were seen."""
        return float(self.best[self.labels.index(label)].min())

    def ratio(self, first: str, second: str, *, seed: int = 0) -> Interval:
        """Return the time of one over the time of another."""
        a, b = (self.medians[self.labels.index(label)] for label in (first, second))
        return ratio_of_medians(a, b, seed=seed)


def take_turns(
    entries: Sequence[Entry],
    *,
    rounds: int = ROUNDS,
    sessions: int = SESSIONS,
    turn_s: float = TURN_S,
    seed: int = 0,
    step: Callable[[int, int], None] | None = None,
) -> Turns:
    """Time contestants against each other.

    Args:
        entries: At least one, all with the same number of threads and different labels.
        rounds: Turns of every process.
        sessions: How often all processes are started anew.
        turn_s: Seconds aimed at for a turn.
        seed: Of the order inside the rounds.
        step: Told (rounds done, rounds in all).

    Raises:
        UsageError: Two entries share a label, or differ in their threads.
        BitwrightError: A contestant cannot be run.
    """
    labels = tuple(e.label for e in entries)
    if len(set(labels)) != len(labels) or len({e.threads for e in entries}) != 1:
        what = "contestants need different names and the same number of threads"
        raise UsageError(what, where=", ".join(labels), fix="give each model once")
    medians = np.empty((len(entries), sessions, rounds))
    best, random = np.empty_like(medians), np.random.default_rng(seed)
    preempted = wall = 0.0
    for session in range(sessions):
        with ExitStack() as stack:
            running = [stack.enter_context(Contestant(e)) for e in entries]
            for contestant in running:
                contestant.wait_ready(turn_s)
            for number in range(rounds):
                for k in random.permutation(len(running)):
                    found = running[k].turn()
                    medians[k, session, number] = np.median(found["seconds"])
                    best[k, session, number] = min(found["seconds"])
                    preempted, wall = preempted + found["preempted"], wall + found["wall_s"]
                if step is not None:
                    step(session * rounds + number + 1, sessions * rounds)
    return Turns(labels, entries[0].clock, medians, best, preempted / max(wall, 1e-9))
