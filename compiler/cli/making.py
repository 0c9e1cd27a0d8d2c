"""``compile`` and ``quantize``: the verbs that make something of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place, parse_buckets, parse_dynamic, parse_pads
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.cli.quantization import Quantization
from bitwright.compiler.cli.tuning import Tune, TuningPlaces
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.tune.budget import parse_budget as parse_tuning

if TYPE_CHECKING:
    from bitwright.compiler.plan.planner import RuntimeName


def compile_verb(
    out: Output,
    model: arg.Model,
    target: arg.Targets,
    quantization: Quantization,
    places: TuningPlaces,
    output: arg.OutputFolder = None,
    tune: Tune = "off",
    bucket: arg.Buckets = None,
    pad: arg.Pads = None,
    loop: arg.Loop = None,
    dynamic: arg.Dynamic = None,
    context: arg.Context = None,
    static: arg.Static = None,
    synth: arg.Synth = False,
    pnr: arg.PlaceAndRoute = False,
    stop_after: arg.StopAfter = None,
    dump: arg.Dump = None,
    dry_run: arg.DryRun = False,
    timeout: arg.Timeout = 1800.0,
) -> None:
    """Compile a model for one or more targets: library, runner, Q/DQ model, report, proof."""
    free, longest = parse_dynamic(dynamic)
    values = {
        **quantization.values(),
        **places.values(),
        "tune": parse_tuning(tune),
        "model": model,
        "buckets": parse_buckets(bucket or ()),
        "pad": parse_pads(pad or ()),
        "loop": loop,
        "dynamic": free,
        "longest": longest,
        "context": context,
        "static": static,
        "steps": frozenset(name for name, wanted in (("synth", synth or pnr), ("pnr", pnr)) if wanted),
        "stop_after": stop_after,
        "dump": dump,
        "timeout_s": timeout,
    }
    if output is None and not dry_run and stop_after is None:
        what = "no output folder"
        raise UsageError(what, where="--output", fix="pass -o FOLDER")
    jobs = _jobs(target, output, values)
    if dry_run:
        _dry_run(out, [options for _, options in jobs], "artifact")
        return
    for _, options in jobs:
        _check_folders(options)
    records = [_compile_one(out, name, options) for name, options in jobs]
    if out.json:
        out.document({"outputs": records})


def _jobs(targets: list[str], output: Path | None, values: dict[str, Any]) -> list[tuple[str, Options]]:
    """Return the profile's name and the options for every target; all are checked before the first is compiled."""
    from bitwright.targets.loader import load_profile

    names = [load_profile(t).name for t in targets]
    doubled = next((n for n in names if names.count(n) > 1), None)
    if doubled is not None:
        what = f"'{doubled}' is named twice"
        raise UsageError(what, where="--target", fix="name every target once")

    def place(path: Path | None, name: str) -> Path | None:
        return path / name if path is not None and len(names) > 1 else path

    return [
        (
            name,
            Options(
                **{**values, "dump": place(values["dump"], name)}, target=target, output=place(output, name)
            ),
        )
        for target, name in zip(targets, names, strict=True)
    ]


def _check_folders(options: Options) -> None:
    """Refuse places that cannot be written before any work is done."""
    if options.dump is not None:
        check_place(options.dump / "model.onnx", "--dump")
    if options.output is not None:
        check_place(options.output, "--output")
        if options.output.exists() and not _replaceable(options.output):
            what = "exists and is not a bitwright output folder, so it is not replaced"
            fix = "choose another folder, or remove it first"
            raise UsageError(what, where=f"--output {options.output}", fix=fix)


def _replaceable(path: Path) -> bool:
    from bitwright.compiler.bundle.manifest import MANIFEST_FILE

    return path.is_dir() and (not any(path.iterdir()) or (path / MANIFEST_FILE).is_file())


def _dry_run(out: Output, jobs: list[Options], runtime: RuntimeName) -> None:
    from bitwright.compiler.cli.tables import print_inspection
    from bitwright.compiler.inspect import dry_run

    found = [dry_run(options, runtime) for options in jobs]
    for inspection in found:
        print_inspection(out, inspection)
    if out.json:
        out.document({"inspections": [inspection.to_dict() for inspection in found]})


def _compile_one(out: Output, name: str, options: Options) -> dict[str, Any]:
    from bitwright.compiler.cli.tables import print_report, print_shipped
    from bitwright.compiler.pipeline import compile_model

    with TerminalProgress(out, name) as progress:
        bundle = compile_model(options, progress)
    if bundle is None:
        out.say(
            f"{name}: stopped after {options.stop_after}"
            + (f"; models in {options.dump}" if options.dump else "")
        )
        if options.dump is not None and not out.json:
            out.path(options.dump)
        return {"target": name, "path": None, "stopped_after": options.stop_after, "dump": options.dump}
    print_report(out, bundle.report)
    print_shipped(out, bundle.report["deployment"])
    if not out.json:
        out.path(bundle.path)
    return {"target": name, "path": bundle.path, "report": bundle.report}


def quantize_verb(
    out: Output,
    model: arg.Model,
    target: arg.Target,
    quantization: Quantization,
    output: arg.OutputModel = None,
    gate: arg.Gate = True,
    stream: arg.Stream = "auto",
    resume: arg.Resume = False,
    kv_cache: arg.KVCache = None,
    report: arg.Page = None,
    dry_run: arg.DryRun = False,
) -> None:
    """Quantize a model for ONNX Runtime: one Q/DQ file and the session options that make it fast."""
    output = output or model.with_name(
        f"{model.name.removesuffix('.onnx')}.{_stem(quantization.recipe)}.onnx"
    )
    options = Options(
        model=model,
        target=target,
        output=output,
        gate=gate,
        stream=stream,
        resume=resume,
        kv_cache=kv_cache,
        **quantization.values(),
    )
    if dry_run:
        _dry_run(out, [options], "onnxruntime")
        return
    _check_files(options, report)
    _quantize(out, options, report)


def _tell_of_parts(out: Output, options: Options) -> None:
    from bitwright.compiler.streaming.kept import KeptParts, place_of

    assert options.output is not None
    kept = KeptParts(place_of(options.output))
    if kept.count:
        out.say(f"{kept.folder} holds {kept.count} finished parts: the same command with --resume goes on")


def _stem(recipe: str) -> str:
    return Path(recipe).stem


def _check_files(options: Options, report: Path | None) -> None:
    for path, option in ((options.output, "--output"), (report, "--report")):
        if path is None:
            continue
        check_place(path, option)
        if path.is_dir():
            msg = "is a folder"
            raise UsageError(msg, where=f"{option} {path}", fix="name a file")
        if path.exists() and options.model.exists() and path.samefile(options.model):
            msg = "would overwrite the model itself"
            raise UsageError(msg, where=f"{option} {path}", fix="choose another name")


def _quantize(out: Output, options: Options, page: Path | None) -> None:
    from bitwright.compiler.bundle.atomic import write_atomically
    from bitwright.compiler.cli.tables import print_report
    from bitwright.compiler.deploy import quantize
    from bitwright.compiler.report.page import render_page

    try:
        with TerminalProgress(out) as progress:
            made = quantize(options, progress)
    except KeyboardInterrupt:
        _tell_of_parts(out, options)
        raise
    if page is not None:
        write_atomically(page, render_page(made.report).encode())
    print_report(out, made.report)
    if out.json:
        files = {"model": made.model, "session": made.session, "plan": made.plan, "page": page}
        files["report_file"] = made.report_file
        out.document({**files, "report": made.report})
        return
    for path in (made.model, made.session, made.plan, made.report_file, page):
        if path is not None:
            out.path(path)
