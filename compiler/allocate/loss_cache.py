"""Measured losses on disk: one JSON line each, appended as it is measured, so that a killed run goes on."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from bitwright.compiler.allocate.task import Outcome


class LossCache:
    """Losses by the hash of everything they depend on.

    A line is written in one call and reaches the disk before the next task is waited for. A line that is cut off, or
    is none of ours, is passed over.
    """

    def __init__(self, path: Path | None) -> None:
        """Read ``path`` if it exists; None keeps nothing beyond this object."""
        self._path = path
        self._known: dict[str, Outcome] = {}
        if path is not None and path.exists():
            for line in path.read_bytes().split(b"\n"):
                if (found := _parsed(line)) is not None:
                    self._known[found[0]] = found[1]

    def get(self, key: str) -> Outcome | None:
        """Return what was measured before."""
        return self._known.get(key)

    def put(self, key: str, site: str, fmt: str, outcome: Outcome) -> None:
        """Remember a measurement; names are for readers of the file."""
        self._known[key] = outcome
        if self._path is None:
            return
        loss = outcome.loss if math.isfinite(outcome.loss) else None
        record = {"key": key, "site": site, "format": fmt, "loss": loss, "reason": outcome.reason}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # The line break comes first: it ends a line that another run was killed in.
        line = b"\n" + json.dumps(record, allow_nan=False).encode()
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)


def _parsed(line: bytes) -> tuple[str, Outcome] | None:
    try:
        record = json.loads(line)
        loss = math.inf if record["loss"] is None else float(record["loss"])
        return None if math.isnan(loss) else (str(record["key"]), Outcome(loss, str(record["reason"])))
    except (ValueError, KeyError, TypeError):
        return None
