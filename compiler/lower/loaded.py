"""A compiled library in this process, by the runtime alone: no compiler is imported."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi

from bitwright.compiler.errors import ToolchainError

RUNTIME_LIBRARY = "libtvm_runtime.so"
RUNTIME_FUNCTION = "runtime.NumThreads"  # one that the runtime library registers
CPU_DEVICE, POOLED_ALLOCATOR = 1, 2
ALIGNMENT = 64
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18


def ask_for_tiles() -> None:
    """Ask Linux for the tile registers (AMX); a refusal matters only to kernels that use them."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)


@dataclass(frozen=True)
class LoadedLibrary:
    """A library whose functions can be called.

    Attributes:
        main: The function: tensors in, a tensor or a sequence of them out.
    """

    main: Callable[..., Any]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the outputs, in order, as copies."""
        return [np.from_dlpack(t).copy() for t in _flat(self.main(*map(tensor, arrays)))]

    def bind(self, arrays: Sequence[np.ndarray]) -> Callable[[], object]:
        """Return a call on fixed inputs."""
        main, tensors = self.main, [tensor(a) for a in arrays]
        return lambda: main(*tensors)


def _flat(value: Any) -> list[Any]:
    """Return the tensors of a result that may be nested."""
    if isinstance(value, tvm_ffi.Tensor):
        return [value]
    return [t for item in value for t in _flat(item)]


def tensor(array: np.ndarray) -> Any:
    """Return a copy of an array as a tensor that is aligned as kernels expect."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    aligned = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return tvm_ffi.from_dlpack(aligned)


def _load_runtime(folder: Path) -> None:
    """Load TVM's runtime unless this process has one already: a second copy of it would end the process."""
    if tvm_ffi.get_global_func(RUNTIME_FUNCTION, allow_missing=True) is None:
        ctypes.CDLL(str(folder / RUNTIME_LIBRARY), ctypes.RTLD_GLOBAL)


def load_library(path: Path, runtime: Path, function: str = "main") -> LoadedLibrary:
    """Load a library that holds a compiled model.

    Args:
        path: The shared library.
        runtime: Folder with TVM's runtime library.
        function: Which of its functions.

    Raises:
        ToolchainError: It cannot be loaded.
    """
    ask_for_tiles()
    try:
        _load_runtime(runtime)
        machine = tvm_ffi.load_module(str(path))["vm_load_executable"]()
        machine["vm_initialization"](CPU_DEVICE, 0, POOLED_ALLOCATOR)
        return LoadedLibrary(machine[function])
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        what = f"the library cannot be loaded: {' '.join(str(error).split())}"
        raise ToolchainError(what, where=str(path), fix="compile again") from error
