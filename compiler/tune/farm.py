"""Names and addresses of boards behind an RPC tracker."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from bitwright.compiler.errors import ToolchainError, UsageError

CONNECT_S = 5.0
_KEY = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


@dataclass(frozen=True)
class Farm:
    """Boards of one kind.

    Attributes:
        device_key: What the boards' servers call themselves.
        tracker: ``HOST:PORT``; None where only records of earlier sessions are wanted.
    """

    device_key: str
    tracker: str | None = None


def parse_farm(tracker: str | None, device_key: str | None) -> Farm | None:
    """Return the farm of ``--tracker`` and ``--device-key``, None if neither is given.

    Raises:
        UsageError: The address or the key is not written as it should be, or a tracker comes without a key.
    """
    if tracker is not None:
        parse_tracker(tracker)
    if device_key is None:
        if tracker is None:
            return None
        msg = "which of the tracker's boards?"
        raise UsageError(msg, where="--tracker", fix="name their kind with --device-key KEY")
    if not _KEY.fullmatch(device_key):
        msg = f"'{device_key}' is no device key"
        raise UsageError(msg, where="--device-key", fix="letters, digits, '_', '-' and '.'")
    return Farm(device_key, tracker)


def parse_tracker(text: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``.

    Raises:
        UsageError: It has another form.
    """
    host, colon, port = text.rpartition(":")
    good = colon and host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536
    if not good:
        what = f"'{text}' is not HOST:PORT"
        raise UsageError(what, where="--tracker", fix="e.g. --tracker 192.168.1.10:9190")
    return host.strip("[]"), int(port)


def board_name(device_key: str) -> str:
    """Return what records call boards of a kind."""
    return f"board {device_key}"


def require_answer(tracker: str) -> None:
    """Try to reach a tracker, once: TVM's own client tries for a minute.

    Raises:
        UsageError: It is no address.
        ToolchainError: Nobody answers there.
    """
    host, port = parse_tracker(tracker)
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except OSError as error:
        what = f"no tracker answers at {host}:{port}: {error.strerror or error}"
        fix = f"start one: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {port}"
        raise ToolchainError(what, where="--tracker", fix=fix) from error
