"""Lowering in a child process: TVM can abort, and then only the child dies.

A job is a folder. The parent writes ``model.onnx``, ``profile.json`` and ``choices.json`` (tuned kernels); the
child writes ``progress.txt`` (what it is working on), ``log.txt`` (its stdout and stderr), and then ``objects/``,
``kernels.json`` and
``result.json``, or ``error.json``. Where TVM cannot lower a part of the model, each of the program's segments
has a folder ``segment_K`` instead, with ``objects/`` and ``kernels.json``, or with ``segment_K.onnx`` for ONNX
Runtime.
A failed job's folder is kept: it reproduces the failure with one command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

import onnx_ir as ir

from bitwright.compiler.child import CHILD
from bitwright.compiler.errors import InternalError, ToolchainError, from_record
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.lower.kernel_table import KernelCall, load_table
from bitwright.compiler.lower.memory_plan import MemoryPlan, load_plans
from bitwright.compiler.program.ops import Tensor
from bitwright.compiler.program.segments import EXECUTORS, Executor, NotLowered
from bitwright.targets.backend import KernelChoice
from bitwright.targets.schema import Profile

MAIN = "main"  # the library's function for the model's own shape
WORKER = (*CHILD, "bitwright.compiler.lower.worker")
DEFAULT_TIMEOUT_S = 1800.0
POLL_S = 0.1  # how often the child's memory plan is looked for

# Is shown the memory plans of the library's functions before there is any machine code.
Planned: TypeAlias = Callable[[Mapping[str, MemoryPlan]], None]


@dataclass(frozen=True)
class Job:
    """Paths inside a job's folder."""

    folder: Path

    @property
    def model(self) -> Path:
        """The specialised Q/DQ model with static shapes."""
        return self.folder / "model.onnx"

    def variant(self, name: str) -> Path:
        """The model of a further function of the library."""
        return self.folder / "variants" / f"{name}.onnx"

    def variants(self) -> list[Path]:
        """The models of all further functions; a file's stem is the function's name."""
        return sorted((self.folder / "variants").glob("*.onnx"))

    @property
    def batched(self) -> Path:
        """Functions for any number of elements, each with the names of its inputs that hold elements."""
        return self.folder / "batched.json"

    def batched_inputs(self) -> dict[str, list[str]]:
        """Return the content of :attr:`batched`."""
        found: dict[str, list[str]] = json.loads(self.batched.read_text()) if self.batched.exists() else {}
        return found

    @property
    def lengths(self) -> Path:
        """Functions for any length: ``name``: ``lengths`` and ``bounded``."""
        return self.folder / "lengths.json"

    def length_functions(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Return the content of :attr:`lengths`: name -> lengths, and whether the last is the longest."""
        if not self.lengths.exists():
            return {}
        found = json.loads(self.lengths.read_text())
        return {name: (tuple(entry["lengths"]), bool(entry["bounded"])) for name, entry in found.items()}

    def length_model(self, name: str, length: int) -> Path:
        """The model of a function for any length, at one length."""
        return self.folder / "lengths" / name / f"{length}.onnx"

    @property
    def profile(self) -> Path:
        """The target profile as JSON."""
        return self.folder / "profile.json"

    @property
    def choices(self) -> Path:
        """Tuned kernels by workload key, as JSON."""
        return self.folder / "choices.json"

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
        return self.kernel_table(MAIN)

    def kernel_table(self, function: str) -> Path:
        """The kernel table of one of the library's functions."""
        return self.folder / ("kernels.json" if function == MAIN else f"kernels_{function}.json")

    @property
    def device(self) -> Path:
        """Folder of what belongs to machine code for another processor than the host's; absent without one."""
        return self.folder / "device"

    @property
    def memory(self) -> Path:
        """The memory plans of the library's functions, written as soon as they are made."""
        return self.folder / "memory.json"

    @property
    def result(self) -> Path:
        """Object names, seconds and notes; written last."""
        return self.folder / "result.json"

    @property
    def error(self) -> Path:
        """The child's BitwrightError."""
        return self.folder / "error.json"

    def segment(self, number: int) -> Job:
        """The part of the job that is one segment: a folder inside this one."""
        return Job(self.folder / f"segment_{number}")

    @property
    def segment_model(self) -> Path:
        """The model of a segment that is left to ONNX Runtime."""
        return self.folder / f"{self.folder.name}.onnx"


@dataclass(frozen=True)
class LengthModels:
    """What a function for sequences of any length is made from.

    Attributes:
        models: Length -> the Q/DQ model with that length in its static shapes, ascending.
        bounded: The last length is the longest that will be asked for.
    """

    models: Mapping[int, ir.Model]
    bounded: bool


@dataclass(frozen=True)
class LoweredSegment:
    """A part of a program that is not lowered as a whole.

    Attributes:
        executor: ``"kernels"``: a library made of ``objects``. ``"onnxruntime"``: ``model``.
        inputs: What it reads, in the order of the library's parameters.
        outputs: What it computes for later segments and for the model's outputs, in the library's order.
        steps: Names of its steps.
        objects: Object files, ready for the target's linker; empty for ONNX Runtime.
        kernel_table: Kernel calls in execution order; empty for ONNX Runtime.
        model: ONNX file for ONNX Runtime, else None.
    """

    executor: Executor
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[str, ...]
    objects: tuple[Path, ...] = ()
    kernel_table: tuple[KernelCall, ...] = ()
    model: Path | None = None


@dataclass(frozen=True)
class LoweringResult:
    """What the child produced.

    Attributes:
        objects: Object files of the whole model, ready for the target's linker; empty if there are segments.
        kernel_table: Kernel calls in execution order; of all segments if there are segments.
        seconds: Time of extraction, lowering and code generation in the child.
        notes: One line for each "why not" of the extraction.
        segments: In execution order; empty where the whole model is one library.
        not_lowered: What is left to ONNX Runtime.
        variants: Kernel calls of every further function of the library, by its name.
        memory: Working memory of every function, by its name; empty if there are segments.
    """

    objects: tuple[Path, ...]
    kernel_table: tuple[KernelCall, ...]
    seconds: float
    notes: tuple[str, ...]
    segments: tuple[LoweredSegment, ...] = ()
    not_lowered: tuple[NotLowered, ...] = ()
    variants: Mapping[str, tuple[KernelCall, ...]] = field(default_factory=dict)
    memory: Mapping[str, MemoryPlan] = field(default_factory=dict)


def lower_in_worker(
    model: ir.Model,
    profile: Profile,
    out: Path,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    worker: Sequence[str] = WORKER,
    variants: Mapping[str, ir.Model] = MappingProxyType({}),
    choices: Mapping[str, KernelChoice] = MappingProxyType({}),
    batched: Mapping[str, Sequence[str]] = MappingProxyType({}),
    lengths: Mapping[str, LengthModels] = MappingProxyType({}),
    planned: Planned = lambda _: None,
) -> LoweringResult:
    """Compile a Q/DQ model to object files in a child process.

    What TVM cannot import is left to ONNX Runtime; the result has segments then.

    Args:
        model: Valid Q/DQ model with static shapes.
        profile: Target.
        out: Existing folder; receives the object files and ``kernels.json``, or a folder for each segment.
        timeout_s: Limit for the whole job.
        worker: Arguments of the Python interpreter that start the child; the job's folder is appended.
        variants: Name of a further function of the library (it begins with ``main_``) -> the same model with other
            static shapes. Constants that are equal are stored once.
        choices: Workload key -> its kernel; every other workload gets its template's default.
        batched: Variant -> its inputs that hold elements in their outermost dimension. It computes one element, and
            becomes a function for any number of them.
        lengths: Further functions of the library, for sequences of any length.
        planned: Is called once, while the child goes on to generate code; never if there are segments.

    Raises:
        ToolchainError: TVM crashed, ran out of time or cannot compile the model.
        BitwrightError: Whatever the child raised, of the same class.
    """
    job = Job(Path(tempfile.mkdtemp(prefix="bitwright-lower-")))
    save_model(model, job.model)
    for name, variant in variants.items():
        job.variant(name).parent.mkdir(exist_ok=True)
        save_model(variant, job.variant(name))
    job.profile.write_text(json.dumps(profile.dump()))
    job.batched.write_text(json.dumps({name: list(inputs) for name, inputs in batched.items()}))
    _write_lengths(job, lengths)
    job.choices.write_text(json.dumps({key: choice.as_plain() for key, choice in choices.items()}))
    code = _run(job, timeout_s, worker, planned)
    if job.error.exists():
        _raise_child_error(job)
    if code < 0:
        _fail(job, f"TVM died with signal {-code} while lowering {_stage(job)}")
    if code or not job.result.exists():
        _fail(job, f"the lowering process ended with status {code} while lowering {_stage(job)}")
    result = _collect(job, out)
    shutil.rmtree(job.folder)
    return result


def _write_lengths(job: Job, lengths: Mapping[str, LengthModels]) -> None:
    for name, found in lengths.items():
        for length, model in found.models.items():
            path = job.length_model(name, length)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_model(model, path)
    plain = {name: {"lengths": list(f.models), "bounded": f.bounded} for name, f in lengths.items()}
    job.lengths.write_text(json.dumps(plain))


def _run(job: Job, timeout_s: float, worker: Sequence[str], planned: Planned) -> int:
    # One thread: the machine's other core is the user's. A fixed hash seed: equal inputs give equal bytes.
    # Weights are mapped each for itself, so that what is freed goes back at once (glibc; others do so, or do not care).
    environment = {
        **os.environ,
        "TVM_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
        "MALLOC_MMAP_THRESHOLD_": "262144",
    }
    command = [sys.executable, *worker, str(job.folder)]
    with (
        job.log.open("wb") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            code = _wait(process, job, timeout_s, planned)
        except BaseException:  # an interrupt, too, ends the child
            process.kill()
            raise
    if code is None:
        _fail(job, f"TVM was stopped after {timeout_s:g} s while lowering {_stage(job)}")
    return code


def _wait(process: subprocess.Popen[bytes], job: Job, timeout_s: float, planned: Planned) -> int | None:
    """Return the child's exit status, or None after killing it at the end of its time; pass its plan on meanwhile."""
    deadline, waiting, code = time.monotonic() + timeout_s, True, None
    while code is None:
        try:
            code = process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                process.kill()
                return None
        if waiting and job.memory.exists():
            waiting = False
            planned(load_plans(job.memory.read_text()))
    return code


def _stage(job: Job) -> str:
    return job.progress.read_text() if job.progress.exists() else "nothing yet (it was starting)"


def _fail(job: Job, what: str) -> NoReturn:
    lines = job.log.read_text(errors="replace").strip().splitlines() if job.log.exists() else []
    last = f"; last output: {lines[-1]}" if lines else ""
    fix = f"the job is kept in {job.folder}; its log is {job.log.name}"
    raise ToolchainError(what + last, where="lowering", fix=fix)


def _raise_child_error(job: Job) -> NoReturn:
    data = json.loads(job.error.read_text())
    if isinstance(from_record(data), ToolchainError | InternalError):
        data["fix"] = f"{data['fix']}; the job is kept in {job.folder}".removeprefix("; ")
    else:
        shutil.rmtree(job.folder)
    raise from_record(data)


def _collect(job: Job, out: Path) -> LoweringResult:
    result = json.loads(job.result.read_text())
    seconds, notes = float(result["seconds"]), tuple(result["notes"])
    if "segments" in result:
        segments = tuple(
            _collect_segment(job.segment(k), data, out) for k, data in enumerate(result["segments"])
        )
        table = tuple(call for segment in segments for call in segment.kernel_table)
        left = tuple(
            NotLowered(tuple(d["nodes"]), tuple(d["operators"]), d["reason"]) for d in result["not_lowered"]
        )
        return LoweringResult((), table, seconds, notes, segments, left)
    objects = _copy_objects(job, result["objects"], out)
    _copy_device(job, out)
    shutil.copy2(job.kernels, out / job.kernels.name)
    names = [*(path.stem for path in job.variants()), *job.length_functions()]
    tables = {name: load_table(job.kernel_table(name).read_text()) for name in names}
    table = load_table(job.kernels.read_text())
    memory = load_plans(job.memory.read_text()) if job.memory.exists() else {}
    return LoweringResult(objects, table, seconds, notes, variants=tables, memory=memory)


def _copy_objects(job: Job, names: Sequence[str], out: Path) -> tuple[Path, ...]:
    objects = [job.objects / Path(name).name for name in names]
    return tuple(Path(shutil.copy2(source, out / source.name)) for source in objects)


def _copy_device(job: Job, out: Path) -> None:
    if job.device.exists():
        shutil.copytree(job.device, out / job.device.name)


def _collect_segment(job: Job, data: Mapping[str, Any], out: Path) -> LoweredSegment:
    folder = out / job.folder.name
    folder.mkdir()
    inputs, outputs = (tuple(map(_tensor, data[side])) for side in ("inputs", "outputs"))
    steps = tuple(data["steps"])
    if data["executor"] == EXECUTORS[0]:
        objects = _copy_objects(job, data["objects"], folder)
        _copy_device(job, folder)
        table = load_table(job.kernels.read_text())
        return LoweredSegment(EXECUTORS[0], inputs, outputs, steps, objects, table)
    for path in job.folder.iterdir():  # the model, and its external data if it has any
        shutil.move(path, folder / path.name)
    return LoweredSegment(EXECUTORS[1], inputs, outputs, steps, model=folder / job.segment_model.name)


def _tensor(data: Mapping[str, Any]) -> Tensor:
    return Tensor(str(data["name"]), tuple(int(d) for d in data["shape"]), str(data["dtype"]))
