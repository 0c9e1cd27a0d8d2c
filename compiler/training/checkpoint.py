"""Where training stands, in a file of plain arrays: an .npz with one JSON text among them, never a pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.bundle.atomic import write_atomically
from bitwright.compiler.errors import UsageError
from bitwright.compiler.ingest import npz
from bitwright.compiler.ingest.limits import DEFAULT_LIMITS

_HEADER = "header"
VERSION = 1


@dataclass
class Checkpoint:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        settings: What must be equal for a run to go on; JSON values.
        step: Steps done.
        total: Steps in all.
        best_step, best_loss: The best state by the held-out samples so far.
        history: (step, held-out loss) of every judgement.
        arrays: Parameters, optimizer state and best parameters, by name.
    """

    settings: dict[str, Any]
    step: int
    total: int
    best_step: int
    best_loss: float
    history: list[tuple[int, float]] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file; an existing one is replaced in one move."""
        header = {
            "version": VERSION,
            "settings": self.settings,
            "step": self.step,
            "total": self.total,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "history": self.history,
        }
        text = np.frombuffer(json.dumps(header).encode(), np.uint8)
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **{_HEADER: text, **self.arrays})
        write_atomically(path, stream.getvalue())


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: The file.
        settings: Of the run that wants to go on.

    Raises:
        UsageError: There is none, or it belongs to a run with other settings.
        DataError: It is damaged.
    """
    where = f"--resume {path}"
    if not path.is_file():
        what = "there is no checkpoint to go on from"
        raise UsageError(what, where=where, fix="leave --resume out")
    with npz.opened(path) as archive:
        members = npz.headers(archive, path, DEFAULT_LIMITS)
        arrays = {name: npz.whole(archive, member).copy() for name, member in members.items()}
    text = arrays.pop(_HEADER, np.zeros(0, np.uint8))
    header = _parsed(text, where)
    if header["settings"] != dict(settings):
        changed = sorted(k for k in settings if header["settings"].get(k) != settings[k])
        what = f"the checkpoint was made with other settings: {', '.join(changed) or 'some are gone'}"
        raise UsageError(what, where=where, fix="repeat the options of the first run, or leave --resume out")
    history = [(int(step), float(loss)) for step, loss in header["history"]]
    step, total, best = int(header["step"]), int(header["total"]), int(header["best_step"])
    return Checkpoint(header["settings"], step, total, best, float(header["best_loss"]), history, arrays)


def _parsed(text: np.ndarray, where: str) -> dict[str, Any]:
    keys = {"version", "settings", "step", "total", "best_step", "best_loss", "history"}
    try:
        header = json.loads(bytes(text.astype(np.uint8)).decode())
    except ValueError:
        header = None
    if not isinstance(header, dict) or set(header) != keys or header["version"] != VERSION:
        what = "is no checkpoint of this version"
        raise UsageError(what, where=where, fix="leave --resume out")
    return header
