"""The compiler's own kernels, measured: artifacts of small models or of the user's, each kernel timed by the runner."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bitwright.compiler import artifact, frontend, quantizing
from bitwright.compiler.bundle.verification import Verification
from bitwright.compiler.compilation import Compilation, Progress
from bitwright.compiler.errors import BitwrightError, ModelError
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.plan.cost import estimate
from bitwright.compiler.plan.latency import Chain, chains, crossings
from bitwright.compiler.plan.observations import Observation
from bitwright.compiler.plan.planner import observed_tensors, plan_selection
from bitwright.compiler.probing.blocks import blocks
from bitwright.compiler.probing.measurement import Measurement
from bitwright.compiler.probing.observe import Observed, conversion, operator
from bitwright.compiler.probing.placements import prepare, uniform
from bitwright.targets.schema import Profile


def measure_artifact(
    profile: Profile,
    model: Path | None,
    data: str | None,
    dims: Mapping[str, int],
    *,
    seconds: float,
    progress: Progress,
    measurement: Measurement,
) -> None:
    """Compile models in every format of the artifact, run them and add what their kernels took.

    Args:
        profile: The target; this machine must be it.
        model: The model to measure; None measures small ones until the time is up.
        data: Samples for ``model``.
        dims: Sizes of its dynamic dimensions.
        seconds: Start no further compilation after this long.
        progress: Told about every compilation.
        measurement: Takes the results; what cannot be compiled becomes a note.
    """
    start = time.perf_counter()
    with _models(model) as found:
        for label, path in found:
            for fmt in ("float", *profile.runtimes.artifact.formats()):
                if measurement.observations and time.perf_counter() - start > seconds:
                    return
                name = f"{label}, {fmt}"
                progress.phase(name)
                try:
                    c = prepare(profile, path, data=data, dims=dims, threads=1)
                    measurement.add(name, _compiled(c, fmt))
                except BitwrightError as error:
                    measurement.notes.append(f"{name}: not measured: {error.what}")


@contextmanager
def _models(model: Path | None) -> Iterator[list[tuple[str, Path]]]:
    """Give the user's model, or files of the blocks."""
    if model is not None:
        yield [(model.name, model)]
        return
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        files = []
        for number, block in enumerate(blocks()):
            path = Path(folder) / f"block{number}.onnx"
            save_model(block.model(), path)
            files.append((block.label, path))
        yield files


def _compiled(c: Compilation, fmt: str) -> Observed:
    """Compile in one format, run the artifact on this machine and share out its time."""
    assert c.model is not None
    c.selection = plan_selection(c.model, c.profile, "artifact", c.shapes, formats=uniform(fmt))
    frontend.calibrate(c, observed_tensors(c.selection), [])
    c.plan = frontend.allocate(c, c.selection, "artifact")
    c.quantized = quantizing.draft_model(c, c.plan)
    artifact.specialize_model(c, [])
    with tempfile.TemporaryDirectory(prefix="bitwright-") as folder:
        path = Path(folder)
        artifact.lower(c, path, [])
        artifact.emit(c, path, [])
        artifact.verify(c, path, [])
    assert c.verification is not None
    if c.verification.seconds is None:
        what = f"the artifact was not executed natively: {c.verification.reason or c.verification.executed}"
        raise ModelError(what)
    return _shared_out(c, c.verification)


def _shared_out(c: Compilation, found: Verification) -> Observed:
    """Return an observation for every kernel; float operators share their common time as the cost model says."""
    assert c.selection is not None and found.seconds is not None
    everything = chains(c.selection, c.profile.runtimes.artifact)
    steps = dict(found.step_seconds)
    if c.selection.integer and not steps:
        what = "the runner did not time the kernels"
        raise ModelError(what)
    result: list[Observation] = []
    floats: list[tuple[Chain, float]] = []
    for chain in everything:
        try:
            if chain.writes:  # a Reshape that moves nothing has no kernel
                taken = steps.pop(chain.unit.name, 0.0)
                result.append(operator(chain, taken, c.shapes, c.profile))
            else:
                floats.append((chain, _modelled_s(chain, c)))
        except ModelError:
            continue
    result += _conversions(c, steps)
    total = sum(share for _, share in floats)
    for chain, share in floats:
        result.append(operator(chain, found.float_seconds * share / total, c.shapes, c.profile))
    rest = found.seconds - sum(o.seconds for o in result)
    return Observed(tuple(result), max(rest, 0.0), found.seconds)


def _modelled_s(chain: Chain, c: Compilation) -> float:
    profile = c.profile.model_copy(update={"measured": None})
    return estimate(chain.unit.head, c.shapes, profile, "artifact", "float")


def _conversions(c: Compilation, steps: dict[str, float]) -> Iterator[Observation]:
    """Yield the conversions; one without a kernel of its own is part of the float code beside it."""
    assert c.selection is not None
    for crossing in crossings(c.selection):
        name = crossing.value.name or ""
        label = next((s for s in steps if s in (f"{name}_{crossing.operator}", f"{name}_quantized")), None)
        if name in c.shapes:
            yield conversion(crossing, 0.0 if label is None else steps.pop(label), c.shapes)
