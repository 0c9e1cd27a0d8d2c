"""Every integer kernel of a bundle under the machine's ceilings: what it reaches, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.bench.ceilings import Ceilings, machine_ceilings
from bitwright.compiler.bundle.bundle import LIBRARY_FOLDER, STATIC_MODEL_FILE, Bundle
from bitwright.compiler.bundle.segments import read_kernel_table
from bitwright.compiler.compilation import Progress, Silent
from bitwright.compiler.errors import InternalError, UsageError
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.lower.kernel_table import KernelCall, Stored
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import Dot, Program, Step
from bitwright.targets.toolchain.linker import is_native

CALLS = 30


@dataclass(frozen=True)
class KernelPoint:
    """One kernel call.

    Attributes:
        name: Step, or the tensor whose storage order changes.
        operation: Kind of the step.
        intrinsic: Instruction it is built on, or ``llvm``.
        seconds: Best wall time of the call.
        operations: Two for each multiply-accumulate; elsewhere one for each element written.
        bytes: Inputs, constants and output, each once: the least that must move.
        ceiling: Operations per second that the instruction and the memory allow at this intensity.
        bound: ``compute`` or the level of memory.
    """

    name: str
    operation: str
    intrinsic: str
    seconds: float
    operations: int
    bytes: int
    ceiling: float
    bound: str

    @property
    def gops(self) -> float:
        """Billions of operations per second."""
        return self.operations / self.seconds * 1e-9

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes

    @property
    def share(self) -> float:
        """Share of the ceiling that is reached."""
        return self.operations / self.seconds / self.ceiling


@dataclass(frozen=True)
class Roofline:
    """The kernels of one bundle.

    Attributes:
        label: Of the bundle.
        ceilings: Of the machine.
        kernels: In execution order.
        other_s: Seconds of everything that is no integer kernel.
    """

    label: str
    ceilings: Ceilings
    kernels: tuple[KernelPoint, ...]
    other_s: float

    def lines(self) -> list[str]:
        """Return the summary in words."""
        total = sum(k.seconds for k in self.kernels) + self.other_s
        dots = [k for k in self.kernels if _is_dot(k)]
        busy = sum(k.seconds for k in dots)
        ideal = sum(k.operations / k.ceiling for k in dots)
        bound = sum(k.seconds for k in dots if k.bound == "compute")
        shares = (
            [
                f"dot products: {busy / total:.0%} of the time, {ideal / busy:.0%} of their ceilings, "
                f"{bound / busy:.0%} of it bound by compute"
            ]
            if dots
            else []
        )
        rest = sum(k.seconds for k in self.kernels) - busy
        rows = [
            f"{name}: {row.cached * 1e-9:.0f} GOPS from cache, {row.registers * 1e-9:.0f} from registers"
            for name, row in self.ceilings.instructions.items()
        ]
        reads = [f"{level.name}: {level.bytes_per_s * 1e-9:.0f} GB/s" for level in self.ceilings.levels]
        return [
            *shares,
            f"other integer kernels: {rest / total:.0%} of the time; float code: {self.other_s / total:.0%}",
            *(
                ["the machine is busy: its ceilings are higher than measured here"]
                if self.ceilings.busy
                else []
            ),
            f"ceilings, {self.ceilings.threads} thread(s), {self.ceilings.date}: {'; '.join([*rows, *reads])}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        kernels = [
            {**asdict(k), "gops": k.gops, "intensity": k.intensity, "share": k.share} for k in self.kernels
        ]
        ceilings = self.ceilings.model_dump(mode="json")
        return {"label": self.label, "ceilings": ceilings, "kernels": kernels, "other_s": self.other_s}


def _is_dot(kernel: KernelPoint) -> bool:
    return kernel.operation in ("QGemm", "QConv")


def measure_roofline(
    bundle: str | Path, *, threads: int = 1, label: str = "", progress: Progress | None = None
) -> Roofline:
    """Time every kernel of a bundle's artifact on this machine.

    Args:
        bundle: The bundle's folder.
        threads: Threads that compute.
        label: What the picture calls it; the folder's name by default.
        progress: Told about the steps.

    Raises:
        UsageError: The bundle cannot be executed here natively, is in segments, or holds no golden inputs.
        ToolchainError: The artifact or the measuring process failed.
    """
    opened, watcher = _with_threads(Bundle.open(bundle), threads), progress or Silent()
    _check(opened)
    golden = next(opened.golden(), None)
    if golden is None:
        what = "the bundle holds no golden inputs"
        raise UsageError(what, where=str(bundle), fix="compile again")
    watcher.phase("ceilings")
    ceilings = machine_ceilings(threads)
    watcher.phase("kernels")
    execution = opened.execute(golden.inputs, trace=True, repeat=CALLS)
    program = extract_program(read_model(opened.path / STATIC_MODEL_FILE).model)
    table = read_kernel_table(opened.path / LIBRARY_FOLDER)
    points, other = kernel_points(program, table, execution.call_seconds, ceilings)
    return Roofline(label or Path(bundle).resolve().name, ceilings, points, other)


def _with_threads(bundle: Bundle, threads: int) -> Bundle:
    profile = {**bundle.manifest.profile, "cores": threads}
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"profile": profile}))


def _check(bundle: Bundle) -> None:
    reason = bundle.why_not_executable()
    if reason is None and not is_native(bundle.profile.toolchain.triple):
        reason = "the time of an emulated artifact means nothing"
    if reason is None and bundle.segments is not None:
        reason = "the kernels of an artifact in segments are not timed one by one"
    if reason is None and bundle.rules is not None:
        reason = "the kernels of an artifact of several sizes are not timed one by one"
    if reason is not None:
        raise UsageError(reason, where=str(bundle.path), fix="leave out --roofline")


def kernel_points(
    program: Program,
    table: Sequence[KernelCall],
    call_seconds: Sequence[tuple[str, float]],
    ceilings: Ceilings,
) -> tuple[tuple[KernelPoint, ...], float]:
    """Return the kernels with what they reach, and the seconds of all other calls.

    Args:
        program: What the bundle computes.
        table: Its kernel calls, in order.
        call_seconds: (function, seconds) of every call that was timed.
        ceilings: Of the machine.

    Raises:
        InternalError: The timed calls are not those of the table.
    """
    functions = {call.function for call in table}
    timed = [(f, s) for f, s in call_seconds if f in functions]
    if [f for f, _ in timed] != [call.function for call in table]:
        what = f"{len(timed)} kernel calls were timed, the table lists {len(table)}"
        raise InternalError(what, where="lib/kernels.json")
    producers = {name: step for step in program.steps for name in step.outputs}
    points = tuple(
        _point(call, producers.get(call.output.tensor) if call.step else None, program, seconds, ceilings)
        for call, (_, seconds) in zip(table, timed, strict=True)
    )
    return points, sum(s for f, s in call_seconds if f not in functions)


def _point(
    call: KernelCall, step: Step | None, program: Program, seconds: float, ceilings: Ceilings
) -> KernelPoint:
    size = sum(map(_bytes, (*call.inputs, call.output)))
    operations = prod(call.output.shape)
    compute = float("inf")
    if isinstance(step, Dot):
        operations, size = 2 * geometry_of(step, program).macs, size + step.weight.nbytes
        compute = ceilings.operations_per_s(call.intrinsic)
    level = ceilings.level_of(size)
    by_memory = level.bytes_per_s * operations / size
    bound = "compute" if compute <= by_memory else level.name
    name = step.name if step is not None else f"layout of {call.output.tensor}"
    # The runner's clock has a step of a nanosecond; an empty kernel still takes time.
    taken = max(seconds, 1e-9)
    return KernelPoint(
        name, call.operation, call.intrinsic, taken, operations, size, min(compute, by_memory), bound
    )


def _bytes(stored: Stored) -> int:
    return prod(stored.shape) * np.dtype(stored.dtype).itemsize
