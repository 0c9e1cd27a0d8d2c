"""From TensorIR to CUDA source, and from CUDA source to machine code by nvcc; no GPU is needed for either."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import split_host_device_mods

from bitwright.compiler.errors import InternalError, ToolchainError
from bitwright.targets.nvidia_gpu.ptxas import Resources, read_resources
from bitwright.targets.toolchain.process import run_tool

NVCC_PLACES = ("/usr/local/cuda/bin/nvcc",)
COMPILE_SECONDS = 600.0
# Arithmetic as written: products and sums are fused only where a kernel asks for it, divisions and roots are exact.
OPTIONS = ("-O3", "-std=c++17", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-w")
HOST_PREFIX = "__tvm_ffi_"


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: Its name.
        buffers: What its pointers point to, in order: parameters of the function, or temporaries.
        grid, block: Extents along x, y, z.
        shared_bytes: Shared memory asked for at launch.
    """

    kernel: str
    buffers: tuple[str, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return prod(self.block)


@dataclass(frozen=True)
class DeviceFunction:
    """What a function does on the GPU.

    Attributes:
        parameters: Names of its buffers, in order.
        temporaries: Name -> bytes of buffers between its kernels.
        launches: In order.
    """

    parameters: tuple[str, ...]
    temporaries: Mapping[str, int]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class CudaSource:
    """CUDA C++ of a module's device functions, self-contained.

    Attributes:
        text: For nvcc.
        functions: Name -> what it launches.
    """

    text: str
    functions: Mapping[str, DeviceFunction]

    def launches(self) -> dict[str, tuple[int, int]]:
        """Return kernel -> (threads of a block, shared memory asked for at launch)."""
        found = (launch for function in self.functions.values() for launch in function.launches)
        return {launch.kernel: (launch.threads, launch.shared_bytes) for launch in found}


def cuda_target(architecture: str) -> tvm.target.Target:
    """Return TVM's target of a GPU whose host is this machine."""
    return tvm.target.Target({"kind": "cuda", "arch": architecture}, host="llvm")


def cuda_source(functions: Mapping[str, tirx.PrimFunc], architecture: str) -> CudaSource:
    """Lower scheduled functions and return the source that TVM writes for them.

    Args:
        functions: Name -> function; the kernels' names begin with it.
        architecture: e.g. ``sm_87``.

    Raises:
        InternalError: A function is not made of kernel launches with extents known now.
    """
    target = cuda_target(architecture)
    named = {n: f.with_attr("global_symbol", n).with_attr("target", target) for n, f in functions.items()}
    pipeline, _, finish = tirx.get_tir_pipeline("s_tir")
    with target:
        host, devices = split_host_device_mods(
            pipeline(tirx.transform.BindTarget(target)(tvm.IRModule(named)))
        )
        ((device_target, device),) = devices.items()
        built = tvm_ffi.get_global_func("target.build.cuda")(finish()(device), device_target)
    by_symbol = {
        str(f.attrs["global_symbol"]): f for f in host.functions.values() if "global_symbol" in f.attrs
    }
    found = {
        name: device_function(by_symbol[f"{HOST_PREFIX}{name}"], [str(p.name) for p in function.params])
        for name, function in functions.items()
    }
    return CudaSource(built.inspect_source("cuda"), found)


def device_function(host: tirx.PrimFunc, parameters: Sequence[str]) -> DeviceFunction:
    """Read the launches of a lowered host function.

    Raises:
        InternalError: It does something else than launching kernels with known extents on whole buffers.
    """
    sources: dict[Any, Any] = {}
    temporaries: dict[str, int] = {}
    launches: list[Launch] = []

    def declared(node: Any) -> None:
        sources[node.buffer] = node.data

    def allocated(node: Any) -> None:
        size = prod(int(extent) for extent in node.buffer.shape)
        sources[node.buffer] = name = f"temporary{len(temporaries)}"
        temporaries[name] = size * tvm.DataType(str(node.buffer.dtype)).itemsize

    def called(node: Any) -> None:
        if getattr(node.op, "name", "") == "tirx.call_ffi_kernel":
            launches.append(_launch(node, lambda data: _buffer_name(data, sources)))

    callbacks = [(tirx.DeclBuffer, declared), (tirx.AllocBuffer, allocated), (tvm.ir.Call, called)]
    tvm_ffi.structural_walk(host.body, callbacks, order="pre")
    return DeviceFunction(tuple(parameters), temporaries, tuple(launches))


def _buffer_name(data: Any, sources: Mapping[Any, Any]) -> str:
    """Return the parameter or temporary behind a buffer's data, through all views of it."""
    buffer = data.args[0]
    source = sources.get(buffer)
    if isinstance(source, str):
        return source
    if source is not None and not str(source.op.name).endswith("reinterpret"):
        return _buffer_name(source, sources)
    return str(buffer.name)


def _launch(call: Any, buffer_name: Callable[[Any], str]) -> Launch:
    tags = [str(tag) for tag in call.attrs.launch_params]
    kernel, *rest = call.args
    pointers, extents = rest[: len(rest) - len(tags)], rest[len(rest) - len(tags) :]
    try:
        known = dict(zip(tags, (int(extent) for extent in extents), strict=True))
        buffers = tuple(buffer_name(pointer) for pointer in pointers)
    except (TypeError, AttributeError, IndexError) as error:
        msg = f"kernel {kernel.value} is not launched on whole buffers with known extents: {error}"
        raise InternalError(msg, where="reading the launches of a GPU function") from error
    grid, block = (
        (known.get(f"{kind}.x", 1), known.get(f"{kind}.y", 1), known.get(f"{kind}.z", 1))
        for kind in ("blockIdx", "threadIdx")
    )
    return Launch(str(kernel.value), buffers, grid, block, known.get("tirx.use_dyn_shared_memory", 0))


def find_nvcc() -> str | None:
    """Return nvcc: the one on the path, else where CUDA is usually installed."""
    return shutil.which("nvcc") or next((p for p in NVCC_PLACES if os.access(p, os.X_OK)), None)


def require_nvcc() -> str:
    """Return nvcc.

    Raises:
        ToolchainError: It is not installed.
    """
    found = find_nvcc()
    if found is None:
        msg = "nvcc is not installed"
        raise ToolchainError(msg, where="machine code for the GPU", fix="install the CUDA toolkit 12 or 13")
    return found


def compile_cuda(source: str, architecture: str, kind: str = "cubin") -> tuple[bytes, tuple[Resources, ...]]:
    """Compile CUDA source.

    Args:
        source: Self-contained CUDA C++.
        architecture: e.g. ``sm_87``.
        kind: ``cubin`` (machine code), ``ptx``, or ``fatbin``.

    Returns:
        The code, and what every kernel takes (empty for ptx).

    Raises:
        ToolchainError: nvcc is missing or failed.
    """
    nvcc = require_nvcc()
    with tempfile.TemporaryDirectory(prefix="bitwright-") as name:
        place = Path(name)
        (place / "kernels.cu").write_text(source)
        result = place / f"kernels.{kind}"
        flags = ["-Xptxas", "-v"] if kind != "ptx" else []
        command = [nvcc, f"--{kind}", *_generation(architecture, kind), *OPTIONS, *flags]
        command += ["-o", str(result), "kernels.cu"]
        # ptxas speaks on the error stream.
        said = run_tool(
            command, what="compiling CUDA kernels", timeout_s=COMPILE_SECONDS, folder=place, errors_too=True
        )
        return result.read_bytes(), read_resources(said) if kind != "ptx" else ()


def _generation(architecture: str, kind: str) -> tuple[str, ...]:
    """Return nvcc's options for what code it writes; its short form drops the 'a' of sm_90a from a fatbin's PTX."""
    virtual = architecture.replace("sm_", "compute_")
    if kind == "ptx":
        return (f"-arch={virtual}",)
    code = f"[{architecture},{virtual}]" if kind == "fatbin" else architecture
    return ("-gencode", f"arch={virtual},code={code}")
