"""What a piece of code takes at most, whatever the process took before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROCESS = Path("/proc/self")


@contextmanager
def takes_at_most(kilobytes: int) -> Iterator[None]:
    """Expect resident memory to grow by no more than this, at any moment.

    ``getrusage`` will not do: its peak is that of the process since it began, and no test after a hungry one could
    fail by it. Linux sets its own figure back when told to; elsewhere nothing is measured.
    """
    if sys.platform != "linux":
        yield
        return
    (_PROCESS / "clear_refs").write_text("5")
    before = _peak()
    yield
    grown = _peak() - before
    assert grown < kilobytes, f"{grown} KiB"


def _peak() -> int:
    status = dict(line.split(":", 1) for line in (_PROCESS / "status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])
