"""What a tuning store holds: one record for each kernel that was measured, one for each search that ended."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bitwright.compiler.errors import ProfileError
from bitwright.targets.backend import KernelChoice

FORMAT = 1
Kind = Literal["trial", "finished"]
Status = Literal["ok", "wrong", "crashed", "failed"]
_STATUSES = ("ok", "wrong", "crashed", "failed")
# A longer line is not ours; it is not even parsed.
MAX_LINE = 1 << 16


@dataclass(frozen=True)
class Key:
    """What a time belongs to.

    Attributes:
        workload: See ``compiler.program.workload``.
        hardware: See ``compiler.tune.hardware``.
    """

    workload: str
    hardware: str


@dataclass(frozen=True)
class Record:
    """One line of a store.

    Attributes:
        kind: ``"trial"``: one kernel was measured. ``"finished"``: a search ended; this is what it chose.
        key: What the time belongs to.
        choice: The kernel.
        seconds: Best time of one call; infinite where ``status`` is not ``"ok"``.
        default_s: Best time of the default kernel, which took turns with it.
        status: ``"wrong"``: other results than the default. ``"crashed"``: its process died. ``"failed"``: it
            could not be built.
        rank: Its place among the candidates.
        trials: Of a finished search: kernels measured.
        complete: Of a finished search: it ended by itself, not because the budget did.
        detail: What went wrong.
        when: Seconds since 1970.
    """

    kind: Kind
    key: Key
    choice: KernelChoice
    seconds: float
    default_s: float
    status: Status = "ok"
    rank: int = 0
    trials: int = 0
    complete: bool = True
    detail: str = ""
    when: float = field(default_factory=lambda: round(time.time(), 1))

    @property
    def ratio(self) -> float:
        """Time over the default's."""
        return self.seconds / self.default_s if self.status == "ok" else math.inf

    def name(self) -> str:
        """Return a short name of the record: the checksum of its line."""
        return dump_line(self)[:8]


def dump_line(record: Record) -> str:
    """Return a record as one line: a checksum of the rest, a space, JSON, a line feed."""
    plain: dict[str, Any] = {
        "v": FORMAT,
        "kind": record.kind,
        "workload": record.key.workload,
        "hardware": record.key.hardware,
        "choice": record.choice.as_plain(),
        "seconds": record.seconds if math.isfinite(record.seconds) else None,
        "default_s": record.default_s,
        "status": record.status,
        "rank": record.rank,
        "when": record.when,
    }
    if record.kind == "finished":
        plain |= {"trials": record.trials, "complete": record.complete}
    if record.detail:
        plain["detail"] = record.detail[:200]
    text = json.dumps(plain, separators=(",", ":"), allow_nan=False)
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def load_line(line: bytes) -> Record | None:
    """Return the record of a line, or None if the line is torn, damaged or of another format."""
    checksum, space, text = line.rstrip(b"\n").partition(b" ")
    if not space or len(line) > MAX_LINE or checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        data = json.loads(text)
        return _record(data) if data["v"] == FORMAT else None
    except (ValueError, KeyError, TypeError, ProfileError):
        return None


def _record(data: Mapping[str, Any]) -> Record:
    seconds = data["seconds"]
    if data["kind"] not in ("trial", "finished") or data["status"] not in _STATUSES:
        raise ValueError(data)
    record = Record(
        data["kind"],
        Key(str(data["workload"]), str(data["hardware"])),
        KernelChoice.from_plain(data["choice"]),
        math.inf if seconds is None else float(seconds),
        float(data["default_s"]),
        data["status"],
        int(data["rank"]),
        int(data.get("trials", 0)),
        bool(data.get("complete", True)),
        str(data.get("detail", "")),
        float(data["when"]),
    )
    if not record.default_s > 0 or not record.seconds > 0:
        raise ValueError(data)
    return record
