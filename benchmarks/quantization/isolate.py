"""Run a command in its own process: wall and processor time, peak memory of the process tree, time limit."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

POLL_S = 0.02


@dataclass(frozen=True)
class Usage:
    """What a process took.

    Attributes:
        exit_code: Of the process; negative is the signal that ended it.
        wall_s: Seconds from start to end.
        cpu_s: Processor seconds, user and system, of the process and the children it waited for.
        peak_bytes: Largest sum of the high-water marks of resident memory over the processes alive at one time.
        ended_for: Why it was ended: ``"time"``, ``"memory"``, or "" if it ended by itself.
    """

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    ended_for: Literal["", "time", "memory"]


def _high_water(pid: int) -> int:
    """Return VmHWM of a process in bytes, 0 if it is gone (a zombie has none)."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _tree(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return [pid]


def _end_tree(pid: int) -> None:
    for member in reversed(_tree(pid)):
        try:
            psutil.Process(member).kill()
        except psutil.Error:
            continue


def run_isolated(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    time_limit_s: float,
    memory_limit_bytes: float = float("inf"),
) -> Usage:
    """Run a command to its end or to a limit.

    Args:
        command: Program and arguments.
        environment: Variables set on top of this process's.
        log: Where its output goes.
        time_limit_s: Wall seconds after which the process tree is ended.
        memory_limit_bytes: Resident memory of the process tree at which it is ended.
    """
    with log.open("wb") as sink:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        peak = 0
        ended_for: Literal["", "time", "memory"] = ""
        while True:
            peak = max(peak, sum(_high_water(pid) for pid in _tree(process.pid)))
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            wall = time.perf_counter() - start
            if pid:
                break
            if not ended_for and (wall > time_limit_s or peak > memory_limit_bytes):
                ended_for = "time" if wall > time_limit_s else "memory"
                _end_tree(process.pid)
            time.sleep(POLL_S)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(process.returncode, wall, used.ru_utime + used.ru_stime, peak, ended_for)
