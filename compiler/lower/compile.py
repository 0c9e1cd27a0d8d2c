"""From a Relax module to object files."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tvm
from tvm import relax

from bitwright.compiler.lower.device import Device, host_reorder, host_step
from bitwright.compiler.lower.float.replace import use_float_kernels
from bitwright.compiler.lower.island import import_model
from bitwright.compiler.lower.schedule import schedule_float


class _KeepObjects:
    """An ``fcompile`` for ``export_library`` that links nothing and copies the object files into a folder."""

    object_format = "o"

    def __init__(self, folder: Path) -> None:
        self.folder, self.objects = folder, list[Path]()

    def __call__(self, _output: str, files: Sequence[str], **_options: Any) -> None:
        self.objects = [self.folder / Path(file).name for file in files]
        for source, copy in zip(files, self.objects, strict=True):
            shutil.copyfile(source, copy)


def compile_module(
    module: tvm.IRModule,
    target: dict[str, Any],
    planned: Callable[[tvm.IRModule], None] | None = None,
    scheduled: Callable[[tvm.IRModule], tvm.IRModule] = lambda module: module,
    device: Device | None = None,
) -> Any:
    """Compile a module whose integer kernels are call_tir and whose float rest is Relax operators.

    Args:
        module: Its Relax functions have static shapes.
        target: Fields of ``tvm.target.Target``.
        planned: Is shown the module in which every tensor has its storage.
        scheduled: May change the module when every operator is a scheduled kernel.
        device: How float operators become kernels; None: on the host's processor.

    Returns:
        ``tvm.runtime.Executable``-like object with ``export_library``.
    """
    found = tvm.target.Target(target)
    device = device or HOST
    ready = scheduled(device.optimize(module, found))
    return tvm.compile(ready, target=found, relax_pipeline=_lower_to_vm(planned, device.finish))


def optimize(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Legalize, fuse and schedule the float rest; integer kernels are opaque to all of it."""
    prepare = [relax.transform.DecomposeOpsForInference(), relax.transform.CanonicalizeBindings()]
    passes = [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        # exp, erf, tanh as vectorised polynomials (a few float32 roundings off) instead of scalar library calls
        relax.transform.FastMathTransform(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        # before scheduling: it recognises the unscheduled form of a reshape and makes it a view
        relax.transform.RewriteDataflowReshape(),
    ]
    with target:
        module = use_float_kernels(tvm.transform.Sequential(prepare)(module), target)
        module = tvm.transform.Sequential(passes)(module)
    return schedule_float(module, target)


HOST = Device(host_step, host_reorder, optimize)


def _lower_to_vm(planned: Callable[[tvm.IRModule], None] | None = None, finish: Sequence[Any] = ()) -> Any:
    def show(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        if planned is not None:
            planned(module)
        return module

    return tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            tvm.transform.module_pass(show, opt_level=0, name="ShowMemoryPlan"),
            *finish,
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def export_objects(executable: Any, folder: Path) -> tuple[Path, ...]:
    """Write the object files (code, and constants with the VM's program) into ``folder``; needs no linker."""
    keep = _KeepObjects(folder)
    executable.export_library(str(folder / "library.so"), fcompile=keep)
    return tuple(keep.objects)


def compile_float(model: ir.Model, target: dict[str, Any]) -> Any:
    """Compile a float ONNX model with static shapes by the same pipeline, for comparison.

    Args:
        model: Valid, self-contained ONNX model.
        target: Fields of ``tvm.target.Target``.

    Returns:
        The executable, as ``compile_module`` returns it.

    Raises:
        ToolchainError: TVM cannot import an operator.
    """
    return compile_module(import_model(model, model.graph.name or "model"), target)
