"""Boards behind TVM's RPC tracker: each is a timer that uploads a library, loads it and runs a kernel.

TVM's RPC is neither encrypted nor authenticated, and executes what it is sent: trusted networks only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.tune.external import ExternalMeasurer
from bitwright.compiler.tune.farm import board_name, parse_tracker, require_answer

# A board that gives no answer for so long is taken for hung; its server ends the session itself.
SESSION_S = 120
REPEATS = 10
MIN_REPEAT_MS = 2
_WHERE = "--tracker"

Connect = Callable[[], Any]


@dataclass
class BoardTimer:
    """One board; a lost connection is opened again for the next kernel.

    Attributes:
        hardware: Name of the kind of board.
        connect: Opens a session.
        executed: ``"remote"``.
    """

    hardware: str
    connect: Connect
    executed: str = field(default="remote", init=False)
    _session: Any = field(default=None, init=False)
    _loaded: tuple[Path, Any] | None = field(default=None, init=False)
    _uploads: int = field(default=0, init=False)

    def run(self, library: Path, symbol: str, arguments: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """Execute a kernel and return (best seconds of one call, its output).

        Raises:
            ToolchainError: The kernel crashed on the board, or the board is gone.
        """
        try:
            return self._run(library, symbol, arguments)
        except Exception as error:  # TVM's RPC raises whatever its server met
            self._session, self._loaded = None, None
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            what = f"the board '{self.hardware}' failed: {lines[-1] if lines else type(error).__name__}"
            raise ToolchainError(what, where=_WHERE, fix="see the output of its rpc_server") from error

    def _run(self, library: Path, symbol: str, arguments: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        import tvm

        if self._session is None:
            self._session = self.connect()
        device = self._session.cpu(0)
        module = self._module(library)
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a), device) for a in arguments]
        module[symbol](*tensors)
        output = np.asarray(tensors[-1].numpy())
        timer = module.time_evaluator(symbol, device, 1, REPEATS, MIN_REPEAT_MS)
        return float(min(timer(*tensors).results)), output

    def _module(self, library: Path) -> Any:
        if self._loaded is None or self._loaded[0] != library:
            # A new name each time: the board still has the last library mapped, and overwriting it would crash it.
            self._uploads += 1
            name = f"candidates_{self._uploads}.so"
            self._session.upload(str(library), name)
            self._loaded = library, self._session.load_module(name)
        return self._loaded[1]


def open_farm(tracker: str, device_key: str) -> ExternalMeasurer:
    """Return a measurer over every free board with a key.

    Args:
        tracker: ``HOST:PORT`` of ``python -m tvm.exec.rpc_tracker``.
        device_key: What the boards' ``rpc_server --key`` says.

    Raises:
        UsageError: ``tracker`` is no address.
        ToolchainError: No tracker answers there, or it knows no such board.
    """
    address = parse_tracker(tracker)
    require_answer(tracker)
    from tvm import rpc

    session = rpc.connect_tracker(*address)
    boards = _boards(session.summary(), device_key, tracker)

    def connect() -> Any:
        # A tracker session serves one thread at a time: each board has its own.
        found = rpc.connect_tracker(*address)
        return found.request(device_key, session_timeout=SESSION_S, max_retry=2)

    return ExternalMeasurer([BoardTimer(board_name(device_key), connect) for _ in range(boards)])


def _boards(summary: Any, device_key: str, tracker: str) -> int:
    """Return how many boards are free, one if all are busy: it will be waited for."""
    known = [str(info["key"]).partition(":")[2] for info in summary["server_info"]]
    if device_key not in known:
        what = f"the tracker at {tracker} has no board '{device_key}'"
        fix = f"its boards: {', '.join(sorted(set(known))) or 'none'}"
        raise ToolchainError(what, where="--device-key", fix=fix)
    return max(1, int(summary["queue_info"].get(device_key, {}).get("free", 0)))
