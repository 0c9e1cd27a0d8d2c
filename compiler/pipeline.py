"""``compile``: the phases, one readable list."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from bitwright.compiler import (
    accuracy,
    advising,
    allocation,
    artifact,
    buckets,
    folding,
    frontend,
    generated,
    migration,
    pricing,
    quantizing,
    tuning,
)
from bitwright.compiler.bundle.bundle import REPORT_FILE, Bundle
from bitwright.compiler.bundle.language_files import copy_language_files
from bitwright.compiler.bundle.writer import BundleWriter
from bitwright.compiler.compilation import Compilation, Phase, Progress, Silent
from bitwright.compiler.errors import ToolchainError, UsageError
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.options import Options
from bitwright.compiler.plan.planner import observed_tensors
from bitwright.compiler.report.content import report_content
from bitwright.compiler.shape_choice import refuse_dynamic_outputs
from bitwright.compiler.tune.outcome import Tuning
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import FOLDED_FAMILIES, GENERATED_FAMILIES, PRICED_FAMILIES, Profile


def shapes(c: Compilation, notes: list[str]) -> None:
    """Choose the sizes to compile for; every output must have a fixed shape then."""
    frontend.choose_shapes(c, notes)
    assert c.model is not None
    refuse_dynamic_outputs(c.model, c.shapes)
    buckets.plan_shapes(c, notes)


def plan(c: Compilation, notes: list[str]) -> None:
    """Choose what runs on integers in the compiled artifact."""
    notes.extend(frontend.check_recipe(c, "artifact"))
    c.selection = frontend.select_units(c, "artifact")
    anchors = [u for u in c.selection.units if u.role == "anchor" and weight_of(u.head) is not None]
    integer = sum(u in c.selection.integer for u in anchors)
    notes.append(f"{integer} of {len(anchors)} constant-weight operators run on integers")


def migrate(c: Compilation, notes: list[str]) -> None:
    """Rewrite the float model into an equal one that is easier to quantize."""
    migration.migrate(c, "artifact", notes)


def calibrate(c: Compilation, notes: list[str]) -> None:
    """Learn activation ranges from the data."""
    assert c.selection is not None
    frontend.calibrate(c, observed_tensors(c.selection), notes)
    migration.observe_inputs(c, c.selection)


def allocate(c: Compilation, notes: list[str]) -> None:
    """Give every site its format and scales."""
    if c.allocates:
        if c.recipe.foldings:
            notes.append(f"formats and foldings taken from {c.options.recipe}")
        elif c.profile.family in FOLDED_FAMILIES:
            folding.choose_formats(c, notes)
        elif c.profile.family in PRICED_FAMILIES:
            pricing.choose_formats(c, notes)
        else:
            allocation.choose_formats(c, "artifact", notes)
    assert c.selection is not None
    c.plan = frontend.allocate(c, c.selection, "artifact")


def quantize(c: Compilation, notes: list[str]) -> None:
    """Round the weights and insert Q/DQ."""
    assert c.plan is not None
    c.plan = quantizing.with_searched_scales(c, c.plan)
    c.quantized = quantizing.quantized_model(c, c.plan, notes)


def hold_accuracy(c: Compilation, notes: list[str]) -> None:
    """Measure the user's metric and keep its drop within bounds."""
    accuracy.hold(c, "artifact", notes)


def audit(c: Compilation, notes: list[str]) -> None:
    """Run the Q/DQ model in ONNX Runtime: what fused, what it costs in accuracy."""
    assert c.selection is not None
    frontend.audit_model(c, notes)
    advising.choose_changes(c, "artifact")
    c.moments = {}  # the largest thing in memory, read by quantization only; lowering needs the room
    if c.audit is not None and c.audit.unexpected:
        notes.append(
            f"{len(c.audit.unexpected)} quantized operators run in float in ONNX Runtime: this model is planned for "
            "the compiled artifact; `bitwright quantize` plans for ONNX Runtime"
        )


FRONT: tuple[tuple[str, Phase], ...] = (
    ("ingest", frontend.ingest),
    ("normalize", frontend.normalize_model),
    ("shapes", shapes),
    ("plan", plan),
    ("migrate", migrate),
    ("calibrate", calibrate),
    ("allocate", allocate),
    ("quantize", quantize),
    ("accuracy", hold_accuracy),
    ("audit", audit),
    ("specialize", artifact.specialize_model),
    ("tune", tuning.tune),
)
Writing: TypeAlias = tuple[tuple[str, Callable[[Compilation, Path, list[str]], None]], ...]
COMPILED_BACK: Writing = (
    ("lower", artifact.lower),
    ("emit", artifact.emit),
    ("verify", artifact.verify),
)


def generate(c: Compilation, folder: Path, notes: list[str]) -> None:
    """Choose foldings where the target has any, then write the artifact."""
    if c.profile.family in FOLDED_FAMILIES:
        c.foldings = folding.choose_foldings(c, notes)
    generated.generate(c, folder, notes)


GENERATED_BACK: Writing = (
    ("generate", generate),
    ("emit", generated.emit),
    ("verify", generated.verify),
)


def check(options: Options, profile: Profile) -> None:
    """Check that the target has artifacts of the kind that is asked for, before any work is done.

    Raises:
        UsageError: It has not.
        ToolchainError: A tool is missing.
    """
    if profile.family in GENERATED_FAMILIES:
        generated.check(options, profile)
        return
    for step in sorted(options.steps):
        what = f"the artifact for {profile.name} is no circuit"
        raise UsageError(what, where=f"--{step}", fix=f"leave --{step} out, or choose an FPGA with --target")
    tuning.check(options, profile)
    artifact.check(options, profile)


def compile_model(options: Options, progress: Progress | None = None) -> Bundle | None:
    """Compile one model for one target.

    Args:
        options: What to do; ``output`` is the folder that will hold the bundle.
        progress: Told about every phase.

    Returns:
        The finished bundle, or None if ``stop_after`` or a dry run ended it before there was one.

    Raises:
        BitwrightError: See the subclasses; nothing is written then.
    """
    c = Compilation(options, load_profile(options.target), progress or Silent())
    c.refuse_unused_options()
    check(options, c.profile)
    if not _run_front(c):
        return None
    if options.output is None:
        msg = "no output folder"
        raise UsageError(msg, where="--output", fix="pass -o out/")
    from bitwright.compiler.report.page import render_page

    with BundleWriter(options.output) as writer:
        for name, phase in GENERATED_BACK if c.profile.family in GENERATED_FAMILIES else COMPILED_BACK:
            with c.recorded(name) as notes:
                phase(c, writer.path, notes)
        content = report_content(c)
        (writer.path / REPORT_FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        (writer.path / "report.html").write_text(render_page(content))
        assert c.source is not None, "ingest is done"
        copy_language_files(options.model, c.source.model, writer.path)
        writer.commit(c.profile)
    return Bundle.open(options.output)


def tune_model(options: Options, progress: Progress | None = None) -> Tuning:
    """Tune the kernels of one model for one target, and go on where an earlier budget ended.

    Args:
        options: What to quantize and how; ``tune`` is the budget.
        progress: Told about every phase.

    Raises:
        BitwrightError: See the subclasses; what was measured stays in the store.
    """
    c = Compilation(options, load_profile(options.target), progress or Silent())
    tuning.check(options, c.profile)
    for name, phase in FRONT[:-1]:
        with c.recorded(name) as notes:
            phase(c, notes)
    with c.recorded(FRONT[-1][0]) as notes:
        tuning.tune(c, notes, resume=True)
    if c.tuning is None:
        msg = f"no kernel of target '{c.profile.name}' can be timed here, nor are there records"
        raise ToolchainError(msg, where="--target", fix="pass --tracker HOST:PORT --device-key KEY")
    return c.tuning


def _run_front(c: Compilation) -> bool:
    """Run the phases up to the first that writes; returns whether to go on."""
    for number, (name, phase) in enumerate(FRONT):
        with c.recorded(name) as notes:
            phase(c, notes)
        _dump(c, number, name)
        if c.options.stop_after == name:
            return False
    return True


def _dump(c: Compilation, number: int, name: str) -> None:
    """Write the model as it is after a phase, for looking at."""
    model = c.static or c.quantized or c.model
    if c.options.dump is not None and model is not None:
        c.options.dump.mkdir(parents=True, exist_ok=True)
        save_model(model, c.options.dump / f"{number:02d}-{name}.onnx")
