"""The second half of ``compile`` for circuits and fixed accelerators: generated, executed, every layer compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bitwright.compiler.bundle.bundle import (
    GOLDEN_FOLDER,
    LIBRARY_FOLDER,
    MODEL_FILE,
    PLAN_FILE,
    SESSION_FILE,
    STATIC_MODEL_FILE,
)
from bitwright.compiler.bundle.golden import write_golden
from bitwright.compiler.bundle.runtime import ShippedFile
from bitwright.compiler.bundle.verify import verify_folder
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import ToolchainError, UsageError, VerificationError
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session, run
from bitwright.compiler.plan.plan_file import plan_to_yaml
from bitwright.targets.generator import Request, generator_for
from bitwright.targets.schema import Profile


def request_of(options: Options) -> Request:
    """Return what the options ask a generator for."""
    return Request(options.threads, options.timeout_s, options.steps, options.cache)


def check(options: Options, profile: Profile) -> None:
    """Check that the target's artifact can be generated, before any work is done.

    Raises:
        UsageError: An option that means nothing for such a target.
        ToolchainError: A tool is not installed.
    """
    for given, name in (
        (options.static, "--static"),
        (options.buckets, "--bucket"),
        (options.loop, "--loop"),
        (options.dynamic, "--dynamic"),
        (options.context, "--context"),
    ):
        if given:
            what = f"the artifact for {profile.name} has one fixed shape and is no library"
            raise UsageError(what, where=name, fix=f"leave {name} out")
    if not options.tune.off:
        what = f"the artifact for {profile.name} is not tuned by timing kernels"
        raise UsageError(what, where="--tune", fix="leave --tune out")
    generator = generator_for(profile.family)
    for step in sorted(options.steps - set(generator.steps)):
        what = f"the family {profile.family} has no step '{step}'"
        raise UsageError(what, where=f"--{step}", fix=f"leave --{step} out")
    missing = generator.missing_tools(profile, request_of(options))
    if missing is not None:
        what = f"target '{profile.name}' needs tools that are not installed"
        raise ToolchainError(what, where="--target", fix=missing)


def generate(c: Compilation, folder: Path, notes: list[str]) -> None:
    """Write the artifact."""
    assert c.static is not None
    place = folder / LIBRARY_FOLDER
    place.mkdir()
    generator = generator_for(c.profile.family)
    request = replace(request_of(c.options), foldings=c.foldings)
    c.generated = generator.generate(c.static, c.profile, place, request, c.progress.step)
    notes.extend(c.generated.notes)
    notes.extend(f"not on the target: '{node}': {why}" for node, why in c.generated.not_generated.items())
    notes.extend(found.sentence() for found in c.generated.measurements)
    if c.allocation is not None and c.generated.seconds is not None:
        notes.append(
            f"allocated for {c.allocation.totals.latency_s * 1e6:.1f} us, the artifact is estimated at "
            f"{c.generated.seconds * 1e6:.1f} us"
        )
    c.shipped = tuple(
        ShippedFile(path.as_posix(), (place / path).stat().st_size, "model") for path in c.generated.shipped
    )


def emit(c: Compilation, folder: Path, notes: list[str]) -> None:
    """Write everything of the output folder except the report and the manifest."""
    del notes
    assert c.quantized is not None and c.static is not None and c.plan is not None
    save_model(c.quantized, folder / MODEL_FILE)
    save_model(c.static, folder / STATIC_MODEL_FILE)
    (folder / SESSION_FILE).write_text(config_for(c.profile.runtimes.onnxruntime).to_json() + "\n")
    c.plan.foldings = {layer: dict(values) for layer, values in c.foldings.items()}
    (folder / PLAN_FILE).write_text(plan_to_yaml(c.plan, c.recipe.as_plain()))
    session = open_session(c.static, SessionConfig(optimize=False))
    for number, feeds in enumerate(c.golden):
        write_golden(folder / GOLDEN_FOLDER, number, feeds, run(session, feeds))


def verify(c: Compilation, folder: Path, notes: list[str]) -> None:
    """Execute the artifact on the golden samples; every layer must equal its integer reference bit for bit.

    Raises:
        VerificationError: A layer differs from the reference in at least one element.
    """
    c.verification = verify_folder(folder, c.profile)
    notes.extend(c.verification.lines())
    if not c.verification.passed:
        raise VerificationError(
            "the artifact differs from its integer reference:\n  " + "\n  ".join(c.verification.lines()),
            where=str(c.options.model),
            fix="this is a bug of the generator or of a tool; nothing was written",
        )
