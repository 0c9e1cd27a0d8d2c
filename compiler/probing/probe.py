"""``targets probe``: measure what operators take on this machine and write a profile that holds it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitwright.compiler.compilation import Compilation, Progress, Silent
from bitwright.compiler.errors import BitwrightError, UsageError, nearest
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.plan.latency import predict
from bitwright.compiler.plan.observations import tables
from bitwright.compiler.plan.planner import RuntimeName
from bitwright.compiler.probing.artifact import measure_artifact
from bitwright.compiler.probing.blocks import blocks
from bitwright.compiler.probing.measurement import Measurement, measure_all
from bitwright.compiler.probing.observe import Placed
from bitwright.compiler.probing.placements import feeds_of, place, prepare, wishes
from bitwright.compiler.probing.profile_file import (
    base_of,
    default_output,
    today,
    versions,
    write_profile,
)
from bitwright.targets.folding import folder_for
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import FOLDED_FAMILIES, MeasuredTimes, Profile
from bitwright.targets.this_machine import check_this_machine, machine_name

SECONDS = 60.0
RUNTIMES = ("onnxruntime", "artifact")


@dataclass(frozen=True)
class ProbeResult:
    """What a probe wrote.

    Attributes:
        path: The profile.
        profile: It, read back.
        times: What was written into it.
        runtime: ``"onnxruntime"`` or ``"artifact"``.
        measured: Placement or block -> measured seconds of one call.
        predicted: The same, predicted with the written profile; only for a model's own placements.
        calls: Single calls that were measured.
        notes: What could not be measured, and why.
    """

    path: Path
    profile: Profile
    times: MeasuredTimes
    runtime: RuntimeName
    measured: dict[str, float]
    predicted: dict[str, float]
    calls: int
    notes: tuple[str, ...]


def probe(
    target: str,
    *,
    runtime: str = "onnxruntime",
    model: Path | None = None,
    data: str | None = None,
    dims: Mapping[str, int] | None = None,
    output: Path | None = None,
    seconds: float = SECONDS,
    threads: int = 1,
    progress: Progress | None = None,
) -> ProbeResult:
    """Measure a target on this machine, which must be it, and write a profile with the times.

    Args:
        target: Profile name or file.
        runtime: ``"onnxruntime"``, or ``"artifact"`` for the compiler's own kernels.
        model: Measure exactly this model's operators, each in every format; None measures a grid of small models
            and fits the times of everything else to them.
        data: Samples for ``model``; None makes random ones.
        dims: Sizes of its dynamic dimensions.
        output: The file to write; it must not exist.
        seconds: About how long to measure, building the models not included.
        threads: Threads that compute.
        progress: Told about every run.

    Raises:
        UsageError: This machine is not the target, the output exists, or options contradict each other.
        BitwrightError: The model is refused.
    """
    task = _Task(_runtime(runtime), model, data, dims or {}, seconds, threads)
    if model is None and (data is not None or dims):
        what = "samples and sizes belong to a model"
        raise UsageError(what, where="--data" if data is not None else "--dim", fix="name it with --model")
    profile = load_profile(target)
    path = output or default_output(target)
    base = base_of(target, path)
    check_this_machine(profile, target)
    found, placements = _measured(task, profile, progress or Silent())
    if not found.observations:
        what = "nothing could be measured"
        raise UsageError(what, where=target, fix="; ".join(found.notes) or "allow more --seconds")
    times = _times(task, profile, found)
    written = write_profile(profile, base, task.runtime, times, _source(task, found), path)
    predicted = {
        p.label: predict(p.selection, written, task.runtime, p.shapes).seconds
        for p in placements
        if p.label in found.seconds
    }
    calls, notes = len(found.observations), tuple(found.notes)
    return ProbeResult(path, written, times, task.runtime, found.seconds, predicted, calls, notes)


def probe_circuits(
    target: str, *, output: Path | None = None, progress: Progress | None = None
) -> tuple[Path, tuple[str, ...]]:
    """Build circuits of many shapes for a target, fit its cost model to what they take, and write it.

    Args:
        target: Profile name or file, of a family whose layers are folded.
        output: The file to write, ``NAME-costs.yaml`` unless named; it must not exist.
        progress: Told about every circuit.

    Returns:
        The file, and lines on how well the model fits and how to use it.

    Raises:
        UsageError: The output exists.
        ToolchainError: A tool is missing or failed.
    """
    profile = load_profile(target)
    path = output or Path(f"{profile.name}-costs.yaml")
    if path.exists():
        what = f"{path} exists"
        raise UsageError(what, where="--output", fix="name another file")
    told = progress or Silent()
    told.phase("engines")
    return path, folder_for(profile.family).probe(profile, path, told.step)


def is_circuit(target: str) -> bool:
    """Tell whether a target's cost model is one of circuits rather than of times on this machine."""
    return load_profile(target).family in FOLDED_FAMILIES


@dataclass(frozen=True)
class _Task:
    """What to measure; as in :func:`probe`."""

    runtime: RuntimeName
    model: Path | None
    data: str | None
    dims: Mapping[str, int]
    seconds: float
    threads: int


def _measured(task: _Task, profile: Profile, progress: Progress) -> tuple[Measurement, list[Placed]]:
    """Measure; returns a model's placements, too."""
    found = Measurement()
    placements: list[Placed] = []
    if task.runtime == "artifact":
        measure_artifact(
            profile,
            task.model,
            task.data,
            task.dims,
            seconds=task.seconds,
            progress=progress,
            measurement=found,
        )
    elif task.model is None:
        _measure_blocks(task, profile, progress, found)
    else:
        progress.phase("model")
        c = prepare(profile, task.model, data=task.data, dims=task.dims, threads=task.threads)
        placements = _built(c, found, "")
        progress.phase("measure")
        _measure(placements, profile, task, task.seconds, progress, found)
    return found, placements


def _measure(
    placements: list[Placed],
    profile: Profile,
    task: _Task,
    seconds: float,
    progress: Progress,
    found: Measurement,
) -> None:
    measure_all(
        placements,
        profile,
        threads=task.threads,
        seconds=seconds,
        progress=progress,
        measurement=found,
    )


def _runtime(name: str) -> RuntimeName:
    if name == "onnxruntime":
        return "onnxruntime"
    if name == "artifact":
        return "artifact"
    what = f"unknown runtime '{name}'"
    raise UsageError(what, where="--runtime", fix=nearest(name, RUNTIMES))


def _times(task: _Task, profile: Profile, found: Measurement) -> MeasuredTimes:
    return tables(
        found.observations,
        machine=machine_name(),
        versions=versions(task.runtime),
        date=today(),
        threads=profile.cores if task.runtime == "artifact" else task.threads,
        call_s=found.call_s,
        exact=task.model is not None,
    )


def _source(task: _Task, found: Measurement) -> str:
    what = "small models over a grid of sizes" if task.model is None else task.model.name
    packages = ", ".join(f"{k} {v}" for k, v in versions(task.runtime).items())
    return f"targets probe: {len(found.observations)} calls in {what}; {machine_name()}; {packages}"


def _built(c: Compilation, found: Measurement, prefix: str) -> list[Placed]:
    """Build every placement of a model; a format that cannot be built becomes a note."""
    feeds = feeds_of(c)
    result = []
    for wish in wishes(c):
        try:
            result.append(place(c, wish, feeds))
        except BitwrightError as error:
            found.notes.append(f"{prefix}{wish.label}: not built: {error.what}")
    return result


def _measure_blocks(task: _Task, profile: Profile, progress: Progress, found: Measurement) -> None:
    """Measure every block in every placement, the time shared equally."""
    known = list(blocks())
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        for number, block in enumerate(known):
            progress.phase(block.label)
            path = Path(folder) / f"block{number}.onnx"
            save_model(block.model(), path)
            c = prepare(profile, path, data=None, dims={}, threads=task.threads)
            part = Measurement(notes=found.notes)
            _measure(
                _built(c, found, f"{block.label}, "), profile, task, task.seconds / len(known), progress, part
            )
            found.observations.extend(part.observations)
            found.calls.extend(part.calls)
            found.seconds |= {f"{block.label}, {label}": s for label, s in part.seconds.items()}
