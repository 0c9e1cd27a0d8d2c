"""Execution of GPU kernels on the CPU: the CUDA source that nvcc gets, compiled by the host's C++ compiler.

What it proves: the schedule itself, index arithmetic, tile tails, the permuted layout of shared memory, the fragments
of mma and ldmatrix as the PTX manual lays them out, waits and barriers (under two orders of threads and two moments
of asynchronous copies), and every rounding of the epilogue. What it does not prove: nvcc, ptxas and the processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.compiler.errors import InternalError, ToolchainError
from bitwright.targets.nvidia_gpu.codegen import CudaSource, Launch, cuda_source
from bitwright.targets.toolchain.cache import cache_folder
from bitwright.targets.toolchain.process import run_tool

RUNTIME = Path(__file__).with_name("emulation.h")
COMPILERS = ("c++", "g++", "clang++")
# Contraction off: every product and sum rounds by itself, as on the GPU under the options of codegen.
FLAGS = (
    "-O2",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
    "-U_FORTIFY_SOURCE",
)
COMPILE_SECONDS = 600.0
# (copies early, threads in falling order): both ends of what the hardware may do.
POLICIES = (0, 3)
GUARD = 64
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];")


def compiler() -> str | None:
    """Return the host's C++ compiler, or None."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def why_not_emulated() -> str | None:
    """Return why this machine cannot emulate kernels, or None if it can."""
    return None if compiler() else "the emulation of GPU kernels needs a C++ compiler (c++, g++ or clang++)"


def run_function(
    function: Any, arrays: Sequence[np.ndarray], architecture: str, policy: int = POLICIES[0]
) -> None:
    """Run a scheduled function that is one kernel; its last array is written in place.

    Args:
        function: ``tvm.tirx.PrimFunc``, as in ``Kernel.function``.
        arrays: One for each of its parameters, C-contiguous, shaped as they are.
        architecture: The code generator's, e.g. ``sm_80``.
        policy: One of ``POLICIES``.

    Raises:
        ToolchainError: No C++ compiler, or it failed.
        InternalError: The kernel is wrong: a barrier that not all threads reach, an access outside its buffers.
    """
    source = cuda_source({"kernel": function}, architecture)
    Emulated(source).call("kernel", arrays, policy)


class Emulated:
    """The kernels of a source, compiled for this machine.

    Args:
        source: What TVM wrote for nvcc.

    Raises:
        ToolchainError: No C++ compiler, or it failed.
    """

    def __init__(self, source: CudaSource) -> None:
        self.source = source
        self._library = _loaded(host_source(source.text, tuple(source.launches())))

    def call(self, name: str, arrays: Sequence[np.ndarray], policy: int = POLICIES[0]) -> None:
        """Run the kernels of a function on arrays for its parameters; what they write is written in place.

        Raises:
            InternalError: A kernel is wrong.
        """
        function = self.source.functions[name]
        buffers = {n: np.empty(size, np.uint8) for n, size in function.temporaries.items()}
        buffers |= dict(zip(function.parameters, arrays, strict=True))
        for launch in function.launches:
            self._run(launch, buffers, policy)

    def _run(self, launch: Launch, buffers: Mapping[str, np.ndarray], policy: int) -> None:
        guarded = {name: _Guarded(buffers[name]) for name in launch.buffers}
        passed = [guarded[name] for name in launch.buffers]
        pointers = (ctypes.c_void_p * len(passed))(*(g.address for g in passed))
        sizes = (ctypes.c_size_t * len(passed))(*(g.array.nbytes for g in passed))
        grid, block = ((ctypes.c_uint * 3)(*extents) for extents in (launch.grid, launch.block))
        call = getattr(self._library, f"bw_run_{launch.kernel}")
        call.restype = ctypes.c_char_p
        said = call(pointers, sizes, len(passed), grid, block, launch.shared_bytes, policy)
        if said:
            raise InternalError(said.decode(), where=f"emulated kernel {launch.kernel}")
        for name, copy in guarded.items():
            copy.give_back(launch.kernel, name)


class _Guarded:
    """A copy of an array between guard bytes, aligned as on a GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        size = array.nbytes
        self._room = np.full(size + 3 * 256, GUARD, np.uint8)
        self._at = 256 + -self._room.ctypes.data % 256
        self._room[self._at : self._at + size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.address = self._room.ctypes.data + self._at

    def give_back(self, kernel: str, name: str) -> None:
        """Copy the content back; raise InternalError if the guard bytes changed."""
        end = self._at + self.array.nbytes
        if (self._room[: self._at] != GUARD).any() or (self._room[end:] != GUARD).any():
            msg = f"it writes outside its parameter '{name}'"
            raise InternalError(msg, where=f"emulated kernel {kernel}")
        content = self._room[self._at : end].view(self.array.dtype).reshape(self.array.shape)
        if self.array.flags.writeable:
            self.array[...] = content


def host_source(source: str, kernels: Sequence[str]) -> str:
    """Return C++ for the host: the kernels of a CUDA source behind the emulation's header, and an entry for each.

    The entry ``bw_run_NAME`` takes the kernel's pointers and the bytes behind each, their number, the launch's
    extents and shared memory, and a policy; it returns null, or what went wrong.
    """
    text = source[source.index('extern "C" __global__') :]
    # Inside a function: the block's shared memory of the emulation instead of one that the launch brings.
    text = _DYNAMIC.sub(r"\1* \2 = (\1*)buf_dyn_shmem;", text)
    entries = "".join(_entry(kernel, text) for kernel in kernels)
    return f"{RUNTIME.read_text()}\n{text}\n{entries}"


def _entry(kernel: str, text: str) -> str:
    head = f" {kernel}("
    start = text.index(head) + len(head)
    kinds = [p.rsplit(None, 1)[0] for p in text[start : text.index(")", start)].split(",")]
    arguments = ", ".join(f"({kind})a[{i}]" for i, kind in enumerate(kinds))
    return (
        f"static void bw_call_{kernel}(void** a) {{ {kernel}({arguments}); }}\n"
        f'extern "C" const char* bw_run_{kernel}(void** a, const size_t* sizes, int count, '
        "const unsigned* grid, const unsigned* block, unsigned shared, int policy) {\n"
        f"  return bw_launch(bw_call_{kernel}, a, sizes, count, grid, block, shared, policy);\n}}\n"
    )


@cache
def _loaded(text: str) -> ctypes.CDLL:
    """Compile a source and load it; compiled sources are kept on disk by their content."""
    found = compiler()
    if found is None:
        raise ToolchainError(why_not_emulated() or "", where="emulation", fix="install g++ or clang++")
    digest = hashlib.sha256("\n".join((found, *FLAGS, text)).encode()).hexdigest()[:32]
    library = cache_folder("gpu-emulation") / f"{digest}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(prefix="bitwright-") as name:
            place = Path(name)
            (place / "kernels.cc").write_text(text)
            command = [found, *FLAGS, "-o", "kernels.so", "kernels.cc", "-lm"]
            run_tool(command, what="compiling kernels for emulation", timeout_s=COMPILE_SECONDS, folder=place)
            waiting = library.with_suffix(f".{os.getpid()}")
            shutil.copyfile(place / "kernels.so", waiting)
            waiting.replace(library)
    return ctypes.CDLL(str(library))
