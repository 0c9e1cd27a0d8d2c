"""The child process of ``job``: reads a job's folder, lowers its model and writes object files."""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tvm

from bitwright.compiler.errors import BitwrightError, InternalError, ToolchainError, UsageError, to_record
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.lower.compile import HOST, compile_module, export_objects
from bitwright.compiler.lower.device import HOST_OBJECTS, Device
from bitwright.compiler.lower.dynamic.blocks import call_costs, dot_blocks
from bitwright.compiler.lower.dynamic.functions import DynamicFunction, make_dynamic
from bitwright.compiler.lower.dynamic.lengths import AnyLength, add_any_length
from bitwright.compiler.lower.float.image_order import SlowerOrder
from bitwright.compiler.lower.float.matmul import HALF_SUMS
from bitwright.compiler.lower.float.vectors import vector_unit
from bitwright.compiler.lower.island import importable
from bitwright.compiler.lower.job import MAIN, Job
from bitwright.compiler.lower.kernel_table import dump_table
from bitwright.compiler.lower.memory_plan import write_plans
from bitwright.compiler.lower.planned_memory import memory_plans
from bitwright.compiler.lower.relax_module import DotKernel, build_functions
from bitwright.compiler.lower.shared_packing import by_size, sharing
from bitwright.compiler.lower.static_c.lower import plan_static, write_static
from bitwright.compiler.lower.static_c.network import working_memory
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import FloatIsland, Program, Step, Tensor
from bitwright.compiler.program.segments import Split, split_program
from bitwright.compiler.program.workload import workload_key
from bitwright.targets.backend import Backend, DeviceBackend, Kernel, KernelChoice, backend_for
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
    programs = {MAIN: extract_program(ir.load(job.model))}
    programs |= {path.stem: extract_program(ir.load(path)) for path in job.variants()}
    notes = programs[MAIN].notes
    if profile.codegen.executor == "static":
        result = _lower_static(job, programs, profile, backend)
        _finish(job, notes, result, start)
        return
    try:
        result = _lower_library(job, job, programs, profile, backend)
    except ToolchainError:
        _enter(job, READING)
        split = split_program(extract_program(ir.load(job.model)), importable)
        if not split.not_lowered:
            raise
        if job.variants() or job.length_functions():
            raise _no_variants(split) from None
        result = _lower_segments(job, split, profile, backend)
    _finish(job, notes, result, start)


def _finish(job: Job, notes: Sequence[str], result: Mapping[str, Any], start: float) -> None:
    """Write the job's result: the last thing that a job does."""
    notes = [*notes, *result.get("notes", ())]
    job.result.write_text(json.dumps({**result, "seconds": time.perf_counter() - start, "notes": notes}))


def _lower_static(
    job: Job, programs: Mapping[str, Program], profile: Profile, backend: Backend
) -> dict[str, Any]:
    """Write source, machine code and the kernel table of an executor without a runtime; return what to say of it."""
    if len(programs) > 1:
        what = "an executor without a runtime is compiled for one shape"
        raise UsageError(what, where="--bucket", fix="compile it for one shape, with --dim")
    target = backend.tvm_target(profile)
    model = plan_static(
        programs[MAIN], profile, backend.dot_kernel, target, lambda name: _enter(job, f"'{name}'")
    )
    job.kernels.write_text(dump_table(model.kernel_table))
    write_plans({MAIN: working_memory(model.network, model.plan)}, job.memory)
    _enter(job, COMPILING)
    job.objects.mkdir()
    names, plan = write_static(model, target, profile, f"A network for {profile.name}", job.objects)
    write_plans({MAIN: working_memory(model.network, plan)}, job.memory)
    return {"objects": list(names), "notes": [plan.sentence()]}


def _no_variants(split: Split) -> ToolchainError:
    operators = sorted({operator for found in split.not_lowered for operator in found.operators})
    what = f"a model that needs ONNX Runtime ({', '.join(operators)}) cannot be compiled for several shapes"
    return ToolchainError(what, where="--bucket", fix="compile it for one shape, with --dim")


def _lower_library(
    job: Job, part: Job, programs: dict[str, Program], profile: Profile, backend: Backend
) -> dict[str, Any]:
    """Write one library, as :func:`_write_library`, with the device's compiler at hand if there is a device."""
    if not isinstance(backend, DeviceBackend):
        return _write_library(job, part, programs, profile, backend, HOST)
    with backend.lowering(profile, part.device) as device:
        return _write_library(job, part, programs, profile, backend, device)


def _write_library(
    job: Job, part: Job, programs: dict[str, Program], profile: Profile, backend: Backend, device: Device
) -> dict[str, Any]:
    """Write the object files and the kernel tables of one library into ``part``; return what to say of them.

    ``programs`` is left with those that are needed to the end: code generation needs the room of the others' weights.
    """
    dot_kernel = _chosen_kernels(job, backend)
    halves = _note_halves(programs.values(), backend.tvm_target(profile))
    if len(programs) > 1 or job.length_functions():
        dot_kernel = sharing(dot_kernel, backend)
    # Before the others: the largest kernel of a step chooses how its weight is packed.
    blocks = {name: dot_blocks(programs[name], profile, dot_kernel) for name in job.batched_inputs()}
    ordered = by_size(programs) if len(programs) > 1 else dict(programs)
    lowered = build_functions(
        ordered,
        profile,
        dot_kernel,
        lambda name: _enter(job, f"'{name}'"),
        step_kernel=device.step,
        reorder=device.reorder,
    )
    ordered.clear()
    for name in programs.keys() - job.batched_inputs().keys():
        del programs[name]
    gc.collect()  # what assembled them is a ring of references
    for name, table in lowered.kernel_tables.items():
        part.kernel_table(name).write_text(dump_table(table))
    module = _with_lengths(job, part, lowered.ir_module, profile, dot_kernel, backend)
    _enter(job, COMPILING)

    def scheduled(module: Any) -> Any:
        for name, inputs in job.batched_inputs().items():
            program, table = programs[name], lowered.kernel_tables[name]
            batched = frozenset(program.inputs.index(i) for i in inputs)
            function = DynamicFunction(name, batched, table, blocks[name], call_costs(program))
            module, table = make_dynamic(module, function)
            part.kernel_table(name).write_text(dump_table(table))
        return module

    with warnings.catch_warnings(record=True) as slower:
        warnings.simplefilter("always", SlowerOrder)
        executable = compile_module(
            module,
            backend.tvm_target(profile),
            planned=_note_memory(job, part, profile),
            scheduled=scheduled,
            device=device,
        )
        if device.emulated is not None:
            twin = compile_module(module, dict(device.emulated), scheduled=scheduled, device=device)
            (part.device / HOST_OBJECTS).mkdir()
            export_objects(twin, part.device / HOST_OBJECTS)
    part.objects.mkdir()
    objects = export_objects(executable, part.objects)
    notes = dict.fromkeys(str(w.message) for w in slower if w.category is SlowerOrder)
    return {"objects": [p.name for p in objects], "notes": [*halves, *notes]}


def _note_halves(programs: Iterable[Program], target: dict[str, Any]) -> list[str]:
    """Say what is computed in which precision, if anything is stored in half precision."""
    nodes = {
        node.outputs[0].name
        for program in programs
        for step in program.steps
        if isinstance(step, FloatIsland)
        for node in step.model.graph
        if any(value.dtype == ir.DataType.FLOAT16 for value in node.outputs)
    }
    if not nodes:
        return []
    unit = vector_unit(tvm.target.Target(target))
    products = (
        f"their matrix products multiply in half precision, {HALF_SUMS} to a sum, and add these sums in float32"
        if unit.half_lanes
        else "their matrix products are computed in float32, as the processor multiplies no half precision"
    )
    return [
        f"{len(nodes)} nodes store half precision; {products}; convolutions and everything else compute in float32"
    ]


def _with_lengths(
    job: Job, part: Job, module: Any, profile: Profile, dot_kernel: DotKernel, backend: Backend
) -> Any:
    """Return the module with the functions for sequences of any length; write their kernel tables."""
    for name, (lengths, bounded) in job.length_functions().items():
        _enter(job, f"'{name}' at {len(lengths)} lengths")
        # Read one after the other: the weights of the first are enough.
        programs = (extract_program(ir.load(job.length_model(name, length))) for length in lengths)
        module, table = add_any_length(
            module,
            AnyLength(name, lengths, programs, bounded),
            profile,
            dot_kernel,
            backend.tvm_target(profile),
            lambda step: _enter(job, f"'{step}'"),
        )
        part.kernel_table(name).write_text(dump_table(table))
    return module


def _note_memory(job: Job, part: Job, profile: Profile) -> Callable[[Any], None]:
    longest = {name: lengths[-1] for name, (lengths, bounded) in job.length_functions().items() if bounded}

    def note(module: Any) -> None:
        write_plans(memory_plans(module, profile.cores, longest), part.memory)

    return note


def _chosen_kernels(job: Job, backend: Backend) -> DotKernel:
    """Return the backend's kernels, those that were tuned by their records."""
    plain = json.loads(job.choices.read_text()) if job.choices.exists() else {}
    choices = {key: KernelChoice.from_plain(choice) for key, choice in plain.items()}

    def dot_kernel(step: Step, program: Program, profile: Profile) -> Kernel:
        choice = choices.get(workload_key(step, program)) if choices else None
        return backend.dot_kernel(step, program, profile, choice)

    return dot_kernel


def _lower_segments(job: Job, split: Split, profile: Profile, backend: Backend) -> dict[str, Any]:
    """Write every segment into its folder; return what to say of them."""
    records = []
    for number, segment in enumerate(split.segments):
        part, program = job.segment(number), segment.program
        part.folder.mkdir()
        record: dict[str, Any] = {
            "executor": segment.executor,
            "inputs": [_port(program.tensor(name)) for name in program.inputs],
            "outputs": [_port(program.tensor(name)) for name in program.outputs],
            "steps": [step.name for step in program.steps],
        }
        if segment.executor == "kernels":
            record |= _lower_library(job, part, {MAIN: program}, profile, backend)
        else:
            save_model(segment.onnx_model(), part.segment_model)
        records.append(record)
    notes = dict.fromkeys(note for record in records for note in record.pop("notes", ()))
    left = [asdict(found) for found in split.not_lowered]
    return {"segments": records, "not_lowered": left, "notes": list(notes)}


def _port(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype}


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
        job.error.write_text(json.dumps(to_record(found)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Job(Path(sys.argv[1]))))
