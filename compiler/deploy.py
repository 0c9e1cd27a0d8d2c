"""``quantize``: the ONNX Runtime deployment, one Q/DQ file and the session options that make it fast."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler import accuracy, advising, allocation, frontend, fusion, migration, quantizing
from bitwright.compiler.bundle.language_files import copy_language_files
from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.compilation import Compilation, Progress, Silent
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.ort.no_regret import WORTHWHILE, kinds, no_regret
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session, runs_here
from bitwright.compiler.ort.timing import PairedTiming, time_reopened
from bitwright.compiler.plan.plan_file import plan_to_yaml
from bitwright.compiler.plan.planner import observed_tensors, runtime_of
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.report.content import report_content
from bitwright.compiler.report.written import companion
from bitwright.compiler.streaming.decision import way_of
from bitwright.compiler.streaming.run import stream
from bitwright.targets.loader import load_profile

TIMED_SAMPLES = 4


@dataclass(frozen=True)
class Deployment:
    """What ``quantize`` made.

    Attributes:
        model: The written .onnx file.
        session: The written .session.json.
        plan: The written .plan.yaml, which can be edited and given back as a recipe.
        report: The report's content.
        report_file: The written .report.json, which ``report`` and ``explain`` read.
    """

    model: Path
    session: Path
    plan: Path
    report: dict[str, object]
    report_file: Path


def quantize(options: Options, progress: Progress | None = None) -> Deployment:
    """Quantize a model for ONNX Runtime; write ``options.output`` and its .session.json, .plan.yaml, .report.json."""
    if options.output is None:
        msg = "no output file"
        raise UsageError(msg, where="--output", fix="pass -o q.onnx")
    if (
        options.buckets
        or options.loop is not None
        or options.dynamic is not None
        or options.static is not None
        or options.context is not None
    ):
        msg = "buckets, loops and archives belong to compiled artifacts: a model for ONNX Runtime takes any size"
        raise UsageError(msg, where="options", fix="leave them out, or compile")
    c = Compilation(options, load_profile(options.target), progress or Silent())
    c.refuse_unused_options()
    with c.recorded("ingest") as notes:
        frontend.ingest(c, notes)
    way = way_of(c)
    if way != "off":
        made = _stream(c, way, options.output)
    else:
        run_phases(c)
        made = _write(c, options.output, report_content(c))
    assert c.source is not None, "ingest is done"
    for note in copy_language_files(options.model, c.source.model, options.output.parent):
        c.progress.note(note)
    return made


def _stream(c: Compilation, way: str, output: Path) -> Deployment:
    """Quantize a model part by part, in bounded memory."""
    report = stream(c, way, output, _config(c))
    session, plan, content = (companion(output, s) for s in (".session.json", ".plan.yaml", ".report.json"))
    return Deployment(output, session, plan, report, content)


def run_phases(c: Compilation) -> None:
    """Run every phase of the deployment behind ingest."""
    with c.recorded("normalize") as notes:
        frontend.normalize_model(c, notes)
    with c.recorded("shapes") as notes:
        frontend.choose_shapes(c, notes)
    with c.recorded("plan") as notes:
        notes.extend(frontend.check_recipe(c, "onnxruntime"))
        c.selection = frontend.select_units(c, "onnxruntime")
    with c.recorded("migrate") as notes:
        migration.migrate(c, "onnxruntime", notes)
    with c.recorded("calibrate") as notes:
        frontend.calibrate(c, observed_tensors(c.selection), notes)
        migration.observe_inputs(c, c.selection)
    with c.recorded("allocate") as notes:
        if c.allocates:
            allocation.choose_formats(c, "onnxruntime", notes)
    with c.recorded("gate") as notes:
        if runs_here(runtime_of(c.profile, "onnxruntime")):
            c.selection = _gated(c, notes)
        else:
            notes.append(_not_timed(c))
    with c.recorded("quantize") as notes:
        c.plan = quantizing.with_searched_scales(c, frontend.allocate(c, c.selection, "onnxruntime"))
        c.quantized = quantizing.quantized_model(c, c.plan, notes)
        if c.gate is not None and c.gate.all_float:
            _keep_the_input_unless_faster(c, notes)
    with c.recorded("accuracy") as notes:
        accuracy.hold(c, "onnxruntime", notes, _kept(c))
    with c.recorded("audit") as notes:
        frontend.audit_model(c, notes)
        advising.choose_changes(c, "onnxruntime", _kept(c))
        if c.audit is not None:
            notes.extend(f"{f.kind} '{f.node}': {f.why}" for f in c.audit.unexpected)
            if c.audit.patterns:
                notes.append(
                    f"{len(c.audit.patterns)} patterns are expected to fuse, by published rules: not executed"
                )
    here = runs_here(runtime_of(c.profile, "onnxruntime"))
    with c.recorded("fuse") as notes:
        if here:
            fusion.fuse(c, _config(c), notes)
        else:
            fusion.leave(c, notes)
    with c.recorded("compact") as notes:
        quantizing.compact(c, notes)
    with c.recorded("time") as notes:
        if here:
            _time(c, notes)
        else:
            notes.append(_not_timed(c))


def _not_timed(c: Compilation) -> str:
    provider = c.profile.runtimes.onnxruntime.execution_provider
    return f"not timed: {provider} needs other hardware, and this processor's times say nothing about it"


def _keep_the_input_unless_faster(c: Compilation, notes: list[str]) -> None:
    """Hand back the user's own graph where the rewritten float model (with 8-bit tables, if any) gains nothing."""
    assert c.source is not None and c.quantized is not None and c.plan is not None
    ratio = _timed(c, c.quantized).ratio
    if ratio < (1.0 if c.plan.weights else WORTHWHILE):
        notes.append(f"the rewritten float model takes {ratio:.2f} of the input model's time")
        return
    c.model = c.quantized = c.source.model
    notes.append(
        f"the rewritten float model takes {ratio:.2f} of the input model's time: the input model is kept"
    )


def _config(c: Compilation) -> SessionConfig:
    """Return the session options of the result; those that protect integers would only hinder a float model."""
    if c.gate is not None and c.gate.all_float:
        return SessionConfig(threads=c.options.threads)
    return config_for(runtime_of(c.profile, "onnxruntime"), threads=c.options.threads)


def _build(c: Compilation, keep: frozenset[str]) -> ir.Model:
    selection = frontend.reselect(c, "onnxruntime", keep)
    return quantizing.draft_model(c, frontend.allocate(c, selection, "onnxruntime"))


def _gated(c: Compilation, notes: list[str]) -> Selection:
    """Leave in float what is not faster as integers on this machine."""
    assert c.model is not None and c.selection is not None and c.dataset is not None and c.source is not None
    if not c.options.gate:
        notes.append("switched off: int8 was not compared with float")
        return c.selection
    if c.allocation is not None or not _for_speed(c.selection):
        notes.append("not measured against float: these formats were chosen for size or by the allocator")
        return c.selection
    groups = kinds(c.selection)
    samples = list(islice(c.dataset.batches(1), TIMED_SAMPLES))
    c.gate = no_regret(
        c.source.model,
        lambda keep: _build(c, keep),
        groups,
        samples,
        _config(c),
        progress=lambda what: c.progress.step(0, 0, what),
    )
    keep = c.gate.keep_float
    if c.gate.all_float:
        keep = frozenset().union(*groups.values())
        notes.append("no integer form was faster than float in ONNX Runtime: the model stays in float")
    notes.extend(
        f"{t.subject}: {t.ratio:.2f} of the time{'' if t.adopted else ', rejected'}" for t in c.gate.trials
    )
    return frontend.reselect(c, "onnxruntime", keep)


def _kept(c: Compilation) -> frozenset[str]:
    """Return what the gate leaves in float."""
    return frozenset() if c.gate is None else c.gate.keep_float


# Formats that are chosen to be faster; others are worth their bytes even where they are slower.
FAST_FORMATS = ("int8", "int8-dynamic", "int8-row")


def _for_speed(selection: Selection) -> bool:
    """Tell whether every layer was quantized to be faster."""
    anchors = [u for u in selection.integer if u.role == "anchor" and u.combo is not None]
    return all(u.combo is not None and u.combo.format in FAST_FORMATS for u in anchors)


def _time(c: Compilation, notes: list[str]) -> None:
    assert c.quantized is not None
    timing = _timed(c, c.quantized)
    notes.append(f"{timing.ratio:.2f} of the float model's time in ONNX Runtime")
    if c.timing is None:  # a decoder's next token is what its time is judged by, not the samples
        c.timing = timing


def _timed(c: Compilation, model: ir.Model) -> PairedTiming:
    """Time a model against the input model."""
    assert c.source is not None and c.dataset is not None
    original, plain = c.source.model, SessionConfig(threads=c.options.threads)
    samples = list(islice(c.dataset.batches(1), TIMED_SAMPLES))
    return time_reopened(
        lambda: open_session(model, _config(c)),
        lambda: open_session(original, plain),
        samples,
        first_feeds=fusion.narrowed(samples, model),
    )


def _write(c: Compilation, output: Path, report: dict[str, object]) -> Deployment:
    assert c.quantized is not None and c.plan is not None
    session, plan, content = (
        companion(output, suffix) for suffix in (".session.json", ".plan.yaml", ".report.json")
    )
    beside = {
        session: _config(c).to_json(),
        plan: plan_to_yaml(c.plan, c.recipe.as_plain()),
        content: json.dumps(report, indent=1, allow_nan=False) + "\n",
    }
    write_model_atomically(c.quantized, output, beside)
    return Deployment(output, session, plan, report, content)
