"""The machine's ceilings: measured once for each number of threads and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitwright.compiler.bench.quiet import SPARE_LOAD
from bitwright.compiler.bundle.atomic import write_atomically
from bitwright.compiler.child import CHILD
from bitwright.compiler.errors import ToolchainError, UsageError
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import HOST, load_profile
from bitwright.targets.this_machine import machine_name
from bitwright.targets.toolchain.cache import cache_folder
from bitwright.targets.toolchain.process import run_tool

# Raised when the measuring loops change.
LOOPS_VERSION = 1
LIMIT_S = 600.0


class InstructionCeiling(BaseModel):
    """Operations per second of one dot-product instruction; a multiply-accumulate is two.

    Attributes:
        registers: With operands that stay in registers.
        cached: With operands loaded from the first-level cache, as in a matrix product.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    registers: float = Field(gt=0)
    cached: float = Field(gt=0)


class MemoryCeiling(BaseModel):
    """How fast one level of memory is read.

    Attributes:
        name: ``l2``, ``l3`` or ``memory``.
        bytes: What it holds for one thread.
        bytes_per_s: Bytes per second of all threads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    bytes: int = Field(gt=0)
    bytes_per_s: float = Field(gt=0)


class Ceilings(BaseModel):
    """What a machine reaches at most.

    Attributes:
        machine: Its name.
        threads: Threads that computed.
        date: ISO date of the measurement.
        load: Runnable threads of the machine, when it began.
        versions: Package -> version.
        instructions: Compute row -> ceiling.
        levels: Nearest first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    machine: str
    threads: int
    date: str
    load: float = Field(ge=0)
    versions: dict[str, str]
    instructions: dict[str, InstructionCeiling] = Field(min_length=1)
    levels: tuple[MemoryCeiling, ...] = Field(min_length=1)

    @property
    def busy(self) -> bool:
        """Others competed for the processors, which matters where several threads were timed by the wall clock."""
        return self.threads > 1 and self.load > SPARE_LOAD

    def operations_per_s(self, intrinsic: str) -> float:
        """Return the cached ceiling of an instruction; for code without one, the best that the machine has."""
        row = self.instructions.get(intrinsic)
        return row.cached if row else max(r.cached for r in self.instructions.values())

    def level_of(self, size: int) -> MemoryCeiling:
        """Return the nearest level that holds ``size`` bytes."""
        return next((level for level in self.levels if size <= level.bytes), self.levels[-1])


@dataclass(frozen=True)
class _Key:
    """What decides whether an earlier measurement may be used."""

    machine: str
    threads: int
    tvm: str
    loops: int
    target: dict[str, Any]


def machine_ceilings(threads: int, *, again: bool = False) -> Ceilings:
    """Return this machine's ceilings; they are measured the first time, which takes about half a minute.

    Those of several threads are kept only if nothing else ran.

    Args:
        threads: Threads that compute.
        again: Measure even if they are known.

    Raises:
        UsageError: Nothing is known about measuring this family of processors.
        ToolchainError: The measuring process failed.
    """
    profile = load_profile(HOST)
    module = f"bitwright.targets.{profile.family}.ceiling"
    if find_spec(module) is None:
        what = f"the ceilings of the family {profile.family} cannot be measured"
        raise UsageError(what, where="--roofline", fix="leave it out")
    target = {**backend_for(profile.family).tvm_target(profile), "num-cores": threads}
    key = _Key(machine_name(), threads, version("apache-tvm"), LOOPS_VERSION, target)
    path = _path(key)
    known = None if again else _read(path)
    if known is not None:
        return known
    found = _measured(module, key)
    if not found.busy:  # what other jobs pressed down is no ceiling
        write_atomically(path, (found.model_dump_json(indent=1) + "\n").encode())
    return found


def _path(key: _Key) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()
    return cache_folder("ceilings") / f"{digest[:24]}.json"


def _read(path: Path) -> Ceilings | None:
    """Return what is kept; a damaged file is as good as none."""
    try:
        return Ceilings.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _measured(module: str, key: _Key) -> Ceilings:
    load = psutil.getloadavg()[0]
    wanted = json.dumps({"target": key.target, "threads": key.threads})
    printed = run_tool(
        [sys.executable, *CHILD, module, wanted],
        what="measuring the machine's ceilings",
        timeout_s=LIMIT_S,
        environment={"TVM_NUM_THREADS": str(key.threads)},
    )
    try:
        record = json.loads(printed)
        return Ceilings(
            machine=key.machine,
            threads=key.threads,
            date=datetime.now(tz=UTC).date().isoformat(),
            load=load,
            versions={"apache-tvm": key.tvm},
            **record,
        )
    except (ValueError, TypeError) as error:
        what = f"the measurement of the machine's ceilings gave no record: {error}"
        raise ToolchainError(what, fix="run it again with --debug") from error
