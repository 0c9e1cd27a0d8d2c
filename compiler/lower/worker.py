"""The child process of ``job``: reads a job's folder, lowers its model and writes object files."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.errors import BitwrightError, InternalError, ToolchainError
from bitwright.compiler.lower.compile import compile_module, export_objects
from bitwright.compiler.lower.job import Job
from bitwright.compiler.lower.kernel_table import dump_table
from bitwright.compiler.lower.relax_module import build_module
from bitwright.compiler.program.extract import extract_program
from bitwright.targets.backend import Backend, backend_for
from bitwright.targets.schema import Profile

READING = "the model (reading the integer program)"
COMPILING = "the assembled module (code generation)"


def run(job: Job, backend: Backend | None = None) -> None:
    """Do a job.

    Args:
        job: Its folder holds the model and the profile.
        backend: The profile's family if None.

    Raises:
        BitwrightError: The model cannot be lowered.
    """
    start = time.perf_counter()
    profile = Profile.model_validate_json(job.profile.read_text())
    backend = backend or backend_for(profile.family)
    _enter(job, READING)
    # The parent wrote this file from a model that ingest has vouched for.
    program = extract_program(ir.load(job.model))
    lowered = build_module(program, profile, backend.dot_kernel, lambda name: _enter(job, f"'{name}'"))
    job.kernels.write_text(dump_table(lowered.kernel_table))
    _enter(job, COMPILING)
    executable = compile_module(lowered.ir_module, backend.tvm_target(profile))
    job.objects.mkdir()
    objects = export_objects(executable, job.objects)
    seconds = time.perf_counter() - start
    result = {"objects": [p.name for p in objects], "seconds": seconds, "notes": list(program.notes)}
    job.result.write_text(json.dumps(result))


def _enter(job: Job, stage: str) -> None:
    job.progress.write_text(stage)


def _as_bitwright_error(error: Exception, job: Job) -> BitwrightError:
    """Blame TVM for what happens inside its compiler, and ourselves for everything else."""
    if isinstance(error, BitwrightError):
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    what = f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
    stage = job.progress.read_text() if job.progress.exists() else ""
    kind = ToolchainError if stage == COMPILING else InternalError
    return kind(what, where=f"lowering {stage}".strip(), fix=f"see {job.log.name} in the job's folder")


def main(job: Job, backend: Backend | None = None) -> int:
    """Do a job; a failure is written to its folder. Returns the exit status."""
    try:
        run(job, backend)
    except Exception as error:  # the parent raises it again
        traceback.print_exc()
        found = _as_bitwright_error(error, job)
        fields = {"class": type(found).__name__, "what": found.what, "where": found.where, "fix": found.fix}
        job.error.write_text(json.dumps(fields))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Job(Path(sys.argv[1]))))
