"""TVM's RPC tracker and two servers on this machine, as processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 60.0


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def loopback_farm(log: Path, key: str, boards: int) -> Iterator[str | None]:
    """Start a farm; yields the tracker's HOST:PORT, or None if it does not start. Everything ends with the block."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(module: str, port: int, *arguments: str) -> None:
        command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port)]
        with log.open("ab") as output:
            processes.append(
                subprocess.Popen(
                    [*command, "--port-end", str(port + 1), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, "TVM_NUM_THREADS": "1"},
                    start_new_session=True,
                )
            )

    try:
        port = free_port()
        start("tvm.exec.rpc_tracker", port)
        if _waited(lambda: _answers(port)):
            for _ in range(boards):
                start("tvm.exec.rpc_server", free_port(), "--tracker", f"127.0.0.1:{port}", "--key", key)
        yield f"127.0.0.1:{port}" if _waited(lambda: _boards(port) == boards) else None
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _waited(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return False


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _boards(port: int) -> int:
    from tvm import rpc

    try:
        return len(rpc.connect_tracker("127.0.0.1", port).summary()["server_info"])
    except (OSError, RuntimeError):
        return 0
