"""The process of one contestant: reads an entry, then measures on request until its input ends.

The first line of standard input is an :class:`~bitwright.compiler.bench.entry.Entry`, the answer
``{"ready": true, "once_s": S}``. Each further line ``{"blocks": B, "calls": C}`` is answered with the seconds of one
call in each of B blocks of C calls. An error is answered as ``{"error": {...}}`` and ends the process.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from bitwright.compiler.bench.entry import Clock, Entry, entry_from_json
from bitwright.compiler.errors import BitwrightError, to_record

WARM_UPS, FIRST_CALLS = 2, 3
PARENT_DEATH_SIGNAL = 1  # of prctl
CLOCKS: dict[Clock, Callable[[], float]] = {"thread": time.thread_time, "wall": time.perf_counter}
Call = Callable[[], object]


def open_call(entry: Entry) -> Call:
    """Return the contestant's call, its inputs bound.

    Raises:
        BitwrightError: It cannot be loaded, or does not take the inputs.
    """
    with np.load(entry.feeds, allow_pickle=False) as archive:
        feeds = {name: archive[name] for name in archive.files}
    if entry.kind == "onnxruntime":
        from bitwright.compiler.ort.bound import bound_call
        from bitwright.compiler.ort.session import open_session

        return bound_call(open_session(entry.path, entry.session), feeds)
    from bitwright.compiler.bench.artifact_call import artifact_call

    return artifact_call(entry.path, feeds, entry.session)


def blocks_of(call: Call, clock: Callable[[], float], blocks: int, calls: int) -> list[float]:
    """Return the seconds of one call, averaged over each block of ``calls``."""
    found = []
    for _ in range(blocks):
        start = clock()
        for _ in range(calls):
            call()
        found.append((clock() - start) / calls)
    return found


def measure(call: Call, clock: Clock, blocks: int, calls: int) -> dict[str, Any]:
    """Run one turn.

    Returns:
        ``seconds``: of one call, for every block; ``wall_s``: of the whole turn; ``preempted``: how often the system
        took the processor away from the calling thread.
    """
    call()  # what the others left in the caches is not this contestant's business
    before, start = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw, time.perf_counter()
    seconds = blocks_of(call, CLOCKS[clock], blocks, calls)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    return {"seconds": seconds, "wall_s": wall, "preempted": after - before}


def serve(requests: TextIO, answers: TextIO) -> int:
    """Answer until the requests end; returns the exit code."""

    def answer(record: dict[str, Any]) -> None:
        print(json.dumps(record), file=answers, flush=True)

    try:
        entry = entry_from_json(requests.readline())
        call = open_call(entry)
        blocks_of(call, CLOCKS[entry.clock], 1, WARM_UPS)
        answer({"ready": True, "once_s": min(blocks_of(call, CLOCKS[entry.clock], FIRST_CALLS, 1))})
        for line in requests:
            answer(measure(call, entry.clock, **json.loads(line)))
    except BitwrightError as error:
        answer({"error": to_record(error)})
        return error.exit_code
    return 0


def end_with_parent() -> None:
    """Have Linux end this process when the one that started it ends, even if it is stopped then."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def main() -> int:
    """Serve on standard input and output; whatever a library prints goes to standard error instead."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    code = serve(sys.stdin, answers)
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    exit_code = main()
    os._exit(exit_code)  # the thread pools of two runtimes have nothing left to say
