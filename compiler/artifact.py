"""The second half of ``compile``: fixed shapes, integer kernels, a library, the proof that it computes the same."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from bitwright.compiler import buckets
from bitwright.compiler.bundle.bundle import (
    GOLDEN_FOLDER,
    LIBRARY_FOLDER,
    MODEL_FILE,
    PLAN_FILE,
    SESSION_FILE,
    STATIC_MODEL_FILE,
)
from bitwright.compiler.bundle.functions import write_functions
from bitwright.compiler.bundle.golden import write_golden
from bitwright.compiler.bundle.runtime import add_runtime, add_static, shipped_files
from bitwright.compiler.bundle.segments import KERNEL_TABLE_FILE, segment_path, write_segments
from bitwright.compiler.bundle.static_runtime import add_static_runtime
from bitwright.compiler.bundle.verify import verify_folder
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.errors import ToolchainError, UsageError, VerificationError
from bitwright.compiler.graph.model import static_shape
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.lengths import length_dims
from bitwright.compiler.lower.job import LengthModels, LoweringResult, lower_in_worker
from bitwright.compiler.lower.kernel_table import dump_table
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session, run
from bitwright.compiler.ort.timing import best_wall_seconds
from bitwright.compiler.plan.plan_file import plan_to_yaml
from bitwright.compiler.plan.planner import runtime_of
from bitwright.compiler.program.ops import WeightOnlyDot
from bitwright.compiler.report.deployment import planned_text
from bitwright.compiler.shape_choice import samples_of_shape
from bitwright.passes.normalize import specialize
from bitwright.targets.backend import DeviceBackend, backend_for
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.interface import Interface, Port
from bitwright.targets.toolchain.runner import LIBRARY_FILE


def check(options: Options, profile: Profile) -> None:
    """Check that the target has artifacts of the kind that is asked for, before any work is done.

    Raises:
        UsageError: A static archive of what has no runtime to be linked with.
    """
    if options.static is not None and profile.codegen.executor == "static":
        what = f"an artifact for {profile.name} is C source and object files for firmware already"
        raise UsageError(what, where="--static", fix="leave --static out; the folder's lib is what to link")
    if options.context is not None and profile.codegen.executor == "static":
        what = (
            f"an artifact for {profile.name} has no runtime that could choose among functions and keep caches"
        )
        raise UsageError(what, where="--context", fix="choose a target with an operating system")
    if profile.codegen.kind == "cuda":
        _check_device(options, profile)


def _check_device(options: Options, profile: Profile) -> None:
    """Refuse what only processors' artifacts have, and a machine that cannot compile for the device."""
    for given, name, fix in (
        (options.static, "--static", "leave --static out: the library has the GPU's machine code inside"),
        (options.dynamic, "--dynamic", "compile for the sizes you need, with --bucket or --dim"),
        (options.context, "--context", "compile the decoder for a processor"),
    ):
        if given is not None:
            what = f"an artifact for {profile.name} is a library with kernels of fixed shapes"
            raise UsageError(what, where=name, fix=fix)
    backend = backend_for(profile.family)
    missing = backend.missing_compiler() if isinstance(backend, DeviceBackend) else None
    if missing is not None:
        raise ToolchainError(
            missing, where=f"--target {profile.name}", fix="install the CUDA toolkit 12 or 13"
        )


def specialize_model(c: Compilation, notes: list[str]) -> None:
    """Fix the artifact's shape and fold everything that it determines."""
    assert c.quantized is not None and c.dataset is not None
    if c.rules is None:
        c.golden = samples_of_shape(c.quantized, c.dataset.batches(1), c.dims, c.options.golden)
    else:
        c.golden = buckets.golden_samples(c, c.options.golden)
        buckets.check_quantized(c, notes)
    c.static = c.quantized.clone()
    notes.extend(specialize(c.static, c.dims).notes)


def lower(c: Compilation, folder: Path, notes: list[str]) -> None:
    """Compile the integer program in a worker process and link the library."""
    assert c.static is not None
    lib = folder / LIBRARY_FOLDER
    lib.mkdir()
    objects = folder / "objects"
    objects.mkdir()
    c.lowering = lower_in_worker(
        c.static,
        c.profile,
        objects,
        timeout_s=c.options.timeout_s,
        variants=function_models(c),
        choices=c.choices,
        batched=buckets.batched_inputs(c),
        lengths=length_models(c),
        planned=lambda plans: c.progress.note(planned_text(plans, c.profile.limits)),
    )
    notes.extend(c.lowering.notes)
    notes.extend(found.sentence() for found in c.lowering.not_lowered)
    rounded = sum(call.operation == WeightOnlyDot.__name__ for call in c.lowering.kernel_table)
    if rounded:
        notes.append(
            f"{rounded} products of grouped weights round their activations to 8 bits, each row of each group with a "
            "scale of its own"
        )
    for tool in sorted(_link(c, c.lowering, lib)):
        notes.append(f"linked with {tool}")
    _archive(c, c.lowering, lib)
    for path in sorted(objects.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    objects.rmdir()


def function_models(c: Compilation) -> dict[str, ir.Model]:
    """Return the model of every further function of the library."""
    assert c.quantized is not None
    found = {}
    for name, dims in buckets.function_dims(c).items():
        found[name] = c.quantized.clone()
        specialize(found[name], dims)
    return found


def length_models(c: Compilation) -> dict[str, LengthModels]:
    """Return the models, at several lengths, of every function for any length."""
    assert c.quantized is not None
    found = {}
    for name, sizes in length_dims(c).items():
        models = {length: c.quantized.clone() for length in sizes}
        for length, dims in sizes.items():
            specialize(models[length], dims)
        found[name] = LengthModels(models, bounded=c.options.longest is not None)
    return found


def _link(c: Compilation, lowering: LoweringResult, lib: Path) -> set[str]:
    """Put the libraries, and the models for ONNX Runtime, in their places; return the linkers used."""
    link = backend_for(c.profile.family).link
    if not lowering.segments:
        return {link(lowering.objects, lib / LIBRARY_FILE, c.profile)}
    tools = set()
    for number, segment in enumerate(lowering.segments):
        place = lib / segment_path(number, segment)
        if segment.model is None:
            place.mkdir()
            tools.add(link(segment.objects, place / LIBRARY_FILE, c.profile))
        else:
            for path in list(
                segment.model.parent.iterdir()
            ):  # the model, and its external data if it has any
                path.rename(lib / path.name)
    write_segments(lib, lowering.segments, lowering.not_lowered)
    return tools


def _archive(c: Compilation, lowering: LoweringResult, lib: Path) -> None:
    """Write the model as a static archive, too, if that was asked for."""
    if c.options.static is None:
        return
    if lowering.segments:
        what = "a model that needs ONNX Runtime cannot be linked into a program"
        raise ToolchainError(what, where="--static", fix="leave --static out")
    add_static(lib, lowering.objects, c.profile, _interface(c), c.rules, c.options.static)


def emit(c: Compilation, folder: Path, notes: list[str]) -> None:
    """Write everything of the output folder except the report and the manifest."""
    assert c.quantized is not None and c.static is not None and c.plan is not None and c.lowering is not None
    save_model(c.quantized, folder / MODEL_FILE)
    save_model(c.static, folder / STATIC_MODEL_FILE)
    session = config_for(runtime_of(c.profile, "onnxruntime"))
    (folder / SESSION_FILE).write_text(session.to_json() + "\n")
    (folder / PLAN_FILE).write_text(plan_to_yaml(c.plan, c.recipe.as_plain()))
    lib = folder / LIBRARY_FOLDER
    if not c.lowering.segments:
        (lib / KERNEL_TABLE_FILE).write_text(dump_table(c.lowering.kernel_table))
    if c.rules is not None:
        write_functions(lib, c.rules, c.lowering.variants)
    if c.profile.codegen.executor == "static":
        c.shipped = add_static_runtime(lib, _interface(c))
        _write_golden(c, folder)
        return
    status = add_runtime(lib, c.profile, _interface(c), c.rules, c.options.static)
    c.shipped = shipped_files(lib, c.options.static)
    notes.append(
        f"runner built with {status.compiler}" if status.compiler else f"no runner: {status.missing}"
    )
    _write_golden(c, folder)


def _port(value: ir.Value) -> Port:
    shape = static_shape(value)
    assert shape is not None and value.dtype is not None
    return Port(value.name or "", value.dtype.numpy().name, shape)


def _interface(c: Compilation) -> Interface:
    assert c.static is not None and c.lowering is not None
    # A segment's kernels are in the interface of its library.
    table = () if c.lowering.segments else c.lowering.kernel_table
    roles = {call.function: len(call.inputs) for call in table}
    graph = c.static.graph
    return Interface(tuple(map(_port, graph.inputs)), tuple(map(_port, graph.outputs)), roles)


def _write_golden(c: Compilation, folder: Path) -> None:
    """Golden outputs are those of ONNX Runtime executing the Q/DQ model node by node, as the standard defines it."""
    assert c.static is not None
    assert c.quantized is not None
    # Samples of other shapes than the artifact's need the model that is free in them.
    session = open_session(c.static if c.rules is None else c.quantized, SessionConfig(optimize=False))
    for number, feeds in enumerate(c.golden):
        outputs = run(session, feeds)
        kept = outputs if c.rules is None else {p.name: outputs[p.name] for p in c.rules.answers}
        write_golden(folder / GOLDEN_FOLDER, number, feeds, kept)


def verify(c: Compilation, folder: Path, notes: list[str]) -> None:
    """Execute the artifact and compare every integer kernel with the reference interpreter.

    Raises:
        VerificationError: A kernel differs from the reference in at least one element.
    """
    c.verification = verify_folder(folder, c.profile)
    if c.verification.seconds is not None and c.source is not None:
        c.float_s = best_wall_seconds(open_session(c.source.model), c.golden[-1])
        notes.append(f"{c.verification.seconds / c.float_s:.2f} of the float model's time in ONNX Runtime")
    notes.extend(c.verification.lines())
    if not c.verification.passed:
        raise VerificationError(
            "the compiled artifact differs from the reference interpreter:\n  "
            + "\n  ".join(c.verification.lines()),
            where=str(c.options.model),
            fix="this is a bug in a kernel or in the tool chain; nothing was written",
        )
