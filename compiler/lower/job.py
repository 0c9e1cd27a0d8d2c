"""Lowering in a child process: TVM can abort, and then only the child dies.

A job is a folder. The parent writes ``model.onnx`` and ``profile.json``; the child writes ``progress.txt``
(what it is working on), ``log.txt`` (its stdout and stderr), and then ``objects/``, ``kernels.json`` and
``result.json``, or ``error.json``.
A failed job's folder is kept: it reproduces the failure with one command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import onnx_ir as ir

from bitwright.compiler import errors
from bitwright.compiler.errors import BitwrightError, InternalError, ToolchainError
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.lower.kernel_table import KernelCall, load_table
from bitwright.targets.schema import Profile

WORKER = ("-P", "-m", "bitwright.compiler.lower.worker")
DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Job:
    """Paths inside a job's folder."""

    folder: Path

    @property
    def model(self) -> Path:
        """The specialised Q/DQ model with static shapes."""
        return self.folder / "model.onnx"

    @property
    def profile(self) -> Path:
        """The target profile as JSON."""
        return self.folder / "profile.json"

    @property
    def progress(self) -> Path:
        """What the child is working on, one line."""
        return self.folder / "progress.txt"

    @property
    def log(self) -> Path:
        """Output of the child."""
        return self.folder / "log.txt"

    @property
    def objects(self) -> Path:
        """Folder of object files."""
        return self.folder / "objects"

    @property
    def kernels(self) -> Path:
        """The kernel table."""
        return self.folder / "kernels.json"

    @property
    def result(self) -> Path:
        """Object names, seconds and notes; written last."""
        return self.folder / "result.json"

    @property
    def error(self) -> Path:
        """The child's BitwrightError."""
        return self.folder / "error.json"


@dataclass(frozen=True)
class LoweringResult:
    """What the child produced.

    Attributes:
        objects: Object files, ready for the target's linker.
        kernel_table: Kernel calls in execution order.
        seconds: Time of extraction, lowering and code generation in the child.
        notes: One line for each "why not" of the extraction.
    """

    objects: tuple[Path, ...]
    kernel_table: tuple[KernelCall, ...]
    seconds: float
    notes: tuple[str, ...]


def lower_in_worker(
    model: ir.Model,
    profile: Profile,
    out: Path,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    worker: Sequence[str] = WORKER,
) -> LoweringResult:
    """Compile a Q/DQ model to object files in a child process.

    Args:
        model: Valid Q/DQ model with static shapes.
        profile: Target.
        out: Existing folder; receives the object files and ``kernels.json``.
        timeout_s: Limit for the whole job.
        worker: Arguments of the Python interpreter that start the child; the job's folder is appended.

    Raises:
        ToolchainError: TVM crashed, ran out of time or cannot compile the model.
        BitwrightError: Whatever the child raised, of the same class.
    """
    job = Job(Path(tempfile.mkdtemp(prefix="bitwright-lower-")))
    save_model(model, job.model)
    job.profile.write_text(json.dumps(profile.dump()))
    code = _run(job, timeout_s, worker)
    if job.error.exists():
        _raise_child_error(job)
    if code < 0:
        _fail(job, f"TVM died with signal {-code} while lowering {_stage(job)}")
    if code or not job.result.exists():
        _fail(job, f"the lowering process ended with status {code} while lowering {_stage(job)}")
    result = _collect(job, out)
    shutil.rmtree(job.folder)
    return result


def _run(job: Job, timeout_s: float, worker: Sequence[str]) -> int:
    # One thread: the machine's other core is the user's. A fixed hash seed: equal inputs give equal bytes.
    environment = {**os.environ, "TVM_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    command = [sys.executable, *worker, str(job.folder)]
    with job.log.open("wb") as log:
        try:
            return subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            _fail(job, f"TVM was stopped after {timeout_s:g} s while lowering {_stage(job)}")


def _stage(job: Job) -> str:
    return job.progress.read_text() if job.progress.exists() else "nothing yet (it was starting)"


def _fail(job: Job, what: str) -> NoReturn:
    lines = job.log.read_text(errors="replace").strip().splitlines() if job.log.exists() else []
    last = f"; last output: {lines[-1]}" if lines else ""
    fix = f"the job is kept in {job.folder}; its log is {job.log.name}"
    raise ToolchainError(what + last, where="lowering", fix=fix)


def _raise_child_error(job: Job) -> NoReturn:
    data = json.loads(job.error.read_text())
    kind = getattr(errors, str(data["class"]), InternalError)
    if not (isinstance(kind, type) and issubclass(kind, BitwrightError)):
        kind = InternalError
    fix = data["fix"]
    if issubclass(kind, ToolchainError | InternalError):
        fix = f"{fix}; the job is kept in {job.folder}".removeprefix("; ")
    else:
        shutil.rmtree(job.folder)
    raise kind(data["what"], where=data["where"], fix=fix)


def _collect(job: Job, out: Path) -> LoweringResult:
    result = json.loads(job.result.read_text())
    objects = [job.objects / Path(name).name for name in result["objects"]]
    placed = tuple(Path(shutil.copy2(source, out / source.name)) for source in objects)
    shutil.copy2(job.kernels, out / job.kernels.name)
    table = load_table(job.kernels.read_text())
    return LoweringResult(placed, table, float(result["seconds"]), tuple(result["notes"]))
