"""What one contestant's process runs, as data that crosses a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bitwright.compiler.child import CHILD
from bitwright.compiler.ort.session import SessionConfig

Kind = Literal["artifact", "onnxruntime"]
Clock = Literal["thread", "wall"]
# The three places where a number of threads is read when a library is loaded.
THREAD_VARIABLES = ("TVM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Entry:
    """One way of running a model.

    Attributes:
        label: What results and errors call it.
        kind: ``artifact``: the libraries of a bundle; ``onnxruntime``: an ONNX file.
        path: The bundle's folder or the file.
        feeds: .npz file with the inputs.
        threads: Threads that compute.
        session: Options of ONNX Runtime (of an artifact: for the segments that it executes).
        preload: A shared library to load before all others.
    """

    label: str
    kind: Kind
    path: Path
    feeds: Path
    threads: int = 1
    session: SessionConfig = field(default_factory=SessionConfig)
    preload: Path | None = None

    @property
    def clock(self) -> Clock:
        """One thread: processor time of the calling thread, so that other jobs do not count; else wall time."""
        return "thread" if self.threads == 1 else "wall"

    def command(self) -> list[str]:
        """Return the process to start."""
        return [sys.executable, *CHILD, "bitwright.compiler.bench.child"]

    def environment(self) -> Mapping[str, str]:
        """Return what must be set before the process starts."""
        threads = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        return threads if self.preload is None else {**threads, "LD_PRELOAD": str(self.preload)}

    def to_json(self) -> str:
        """Return one line of JSON."""
        session = {**asdict(self.session), "threads": self.threads}
        record = {**asdict(self), "path": str(self.path), "feeds": str(self.feeds), "session": session}
        del record["preload"]  # has happened when the process reads this
        return json.dumps(record)


def entry_from_json(text: str) -> Entry:
    """Return what :meth:`Entry.to_json` wrote."""
    record: dict[str, Any] = json.loads(text)
    session = SessionConfig(**record.pop("session"))
    entry = Entry(**{**record, "path": Path(record["path"]), "feeds": Path(record["feeds"])})
    return replace(entry, session=session)
