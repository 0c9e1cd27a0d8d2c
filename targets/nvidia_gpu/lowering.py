"""What the lowering process does for a GPU: nvcc behind TVM's code generator, float operators by dlight's rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.s_tir import dlight

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.lower.device import Device
from bitwright.targets.nvidia_gpu import codegen, pointwise
from bitwright.targets.nvidia_gpu.emulated_device import load_runtime
from bitwright.targets.nvidia_gpu.execution import RESOURCES_FILE, SOURCE_FILE
from bitwright.targets.nvidia_gpu.half_products import use_half_kernels
from bitwright.targets.nvidia_gpu.kernels import gpu_of
from bitwright.targets.nvidia_gpu.ptxas import Resources, violations
from bitwright.targets.schema import Profile
from bitwright.targets.sections.gpu import Gpu

CALLBACK = "tvm_callback_cuda_compile"  # TVM asks this function for machine code
_BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)\s*(\w+)\(")


@contextmanager
def lowering(profile: Profile, folder: Path, emulated: dict[str, Any] | None) -> Iterator[Device]:
    """Let TVM generate machine code for the profile's GPU in this process.

    Args:
        profile: Target.
        folder: Is created; gets the CUDA source and what each kernel takes.
        emulated: As in ``Device``.

    Raises:
        ToolchainError: nvcc is missing or failed, or a kernel does not fit the GPU.
    """
    codegen.require_nvcc()
    load_runtime()
    folder.mkdir(exist_ok=True)
    compiler = _Compiler(gpu_of(profile), folder)
    tvm_ffi.register_global_func(CALLBACK, compiler, override=True)
    config = {"relax.backend.use_cuda_graph": True}
    with tvm.transform.PassContext(config=config):
        yield Device(
            pointwise.step_kernel,
            pointwise.reorder,
            partial(optimize, profile),
            (relax.transform.RewriteCUDAGraph(),),
            emulated,
        )


class _Compiler:
    """Machine code for CUDA source, once for each source."""

    def __init__(self, gpu: Gpu, folder: Path) -> None:
        self._gpu, self._folder = gpu, folder
        self._known: dict[str, bytes] = {}

    def __call__(self, source: str) -> bytes:
        if source not in self._known:
            code, resources = codegen.compile_cuda(source, self._gpu.architecture, "fatbin")
            _require_fitting(resources, self._gpu, source)
            (self._folder / SOURCE_FILE).write_text(source)
            found = [asdict(r) for r in resources]
            (self._folder / RESOURCES_FILE).write_text(json.dumps(found, indent=1) + "\n")
            self._known[source] = code
        return self._known[source]


def _require_fitting(found: tuple[Resources, ...], gpu: Gpu, source: str) -> None:
    """Raise unless every kernel fits the processor; spilled registers cost time only."""
    threads = {name: int(count) for count, name in _BOUNDS.findall(source)}
    for resources in found:
        wrong = list(
            violations(resources, gpu, threads.get(resources.name, gpu.threads_per_block), spills=True)
        )
        if wrong:
            msg = f"kernel '{resources.name}' does not fit {gpu.architecture}: {'; '.join(wrong)}"
            raise ToolchainError(msg, where="ptxas -v")


def optimize(profile: Profile, module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Legalize, fuse and schedule the float rest; kernels that are there already are opaque to all of it."""
    prepare = [relax.transform.DecomposeOpsForInference(), relax.transform.CanonicalizeBindings()]
    passes = [
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
        # before scheduling: it recognises the unscheduled form of a reshape and makes it a view
        relax.transform.RewriteDataflowReshape(),
        dlight.ApplyDefaultSchedule(
            dlight.gpu.Matmul(),
            dlight.gpu.GEMV(),
            dlight.gpu.Reduction(),
            dlight.gpu.GeneralReduction(),
            dlight.gpu.Fallback(),
        ),
    ]
    with target:
        module = use_half_kernels(tvm.transform.Sequential(prepare)(module), profile)
        module = tvm.transform.Sequential(passes)(module)
    left = [
        v.name_hint
        for v, f in module.functions_items()
        if isinstance(f, tirx.PrimFunc) and not _is_scheduled(f)
    ]
    if left:
        msg = f"no rule spreads these float operators over the GPU's threads: {', '.join(left)}"
        raise ToolchainError(msg, where="scheduling", fix="leave this part to ONNX Runtime")
    return module


def _is_scheduled(function: tirx.PrimFunc) -> bool:
    return bool(function.attrs and "tirx.is_scheduled" in function.attrs)
