"""A bundle's library in this process, by the C interface of its runtime (``runner/bitwright_runtime.h``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from bitwright.compiler.errors import BitwrightError, DataError, InternalError, ToolchainError, UsageError
from bitwright.targets.toolchain.runner import RUNTIME_LIBRARY

MAX_RANK = 16
ABI_VERSION = 1
# bw_dtype, in its order.
DTYPES = (
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
)
CODES = {np.dtype(name): code for code, name in enumerate(DTYPES)}
# bw_status: whose fault it is.
ERRORS: dict[int, type[BitwrightError]] = {
    1: InternalError,
    2: UsageError,
    3: ToolchainError,
    4: DataError,
    5: ToolchainError,
    6: ToolchainError,
}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * MAX_RANK),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    )


class NativeModel:
    """An opened ``lib`` folder; one thread at a time uses it.

    Args:
        lib: The bundle's ``lib``.
        threads: Threads of a call; None: the profile's cores.

    Raises:
        UsageError: The folder is damaged.
        ToolchainError: It has no runtime for this machine, or the machine lacks instructions.
    """

    def __init__(self, lib: Path, threads: int | None = None) -> None:
        self._runtime = _load(lib)
        self._handle = ctypes.c_void_p()
        self._check(self._runtime.bw_open(str(lib).encode(), ctypes.byref(self._handle)), str(lib))
        if threads is not None:
            self._check(self._runtime.bw_set_threads(self._handle, threads), "threads")
        self._outputs = int(self._runtime.bw_output_count(self._handle))

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Compute the model.

        Args:
            inputs: In the model's order, caches left out.

        Returns:
            The outputs; views of memory that the next call overwrites.

        Raises:
            DataError: An input does not fit.
            ToolchainError: The runtime failed.
        """
        arrays = [np.ascontiguousarray(a) for a in inputs]
        tensors = (_Tensor * len(arrays))(*map(_tensor, arrays))
        self._check(self._runtime.bw_run(self._handle, tensors, len(arrays)), "inputs")
        return [self._result(k) for k in range(self._outputs)]

    def _result(self, number: int) -> np.ndarray:
        found = _Tensor()
        self._check(self._runtime.bw_result(self._handle, number, ctypes.byref(found)), f"output {number}")
        memory = (ctypes.c_uint8 * found.bytes).from_address(found.data)
        return np.frombuffer(memory, DTYPES[found.dtype]).reshape(found.shape[: found.rank])

    def close(self) -> None:
        """Free the handle; results are gone with it."""
        if self._handle:
            self._runtime.bw_close(self._handle)
            self._handle = ctypes.c_void_p()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, status: int, where: str) -> None:
        if status:
            what = self._runtime.bw_last_error().decode(errors="replace")
            raise ERRORS.get(status, InternalError)(what, where=where)


def _load(lib: Path) -> ctypes.CDLL:
    path = (lib / RUNTIME_LIBRARY).resolve()
    try:
        runtime = ctypes.CDLL(str(path))
    except OSError as error:
        what = f"the bundle's runtime cannot be loaded here: {error}"
        fix = "compile for this machine, with a C++ compiler installed; `bitwright verify` emulates others"
        raise ToolchainError(what, where=str(path), fix=fix) from error
    runtime.bw_last_error.restype = ctypes.c_char_p
    runtime.bw_open.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
    runtime.bw_run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
    runtime.bw_result.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
    runtime.bw_set_threads.argtypes = (ctypes.c_void_p, ctypes.c_int32)
    for function in (runtime.bw_close, runtime.bw_output_count):
        function.argtypes = (ctypes.c_void_p,)
    runtime.bw_close.restype = None
    if runtime.bw_abi_version() != ABI_VERSION:
        what = f"its runtime has interface {runtime.bw_abi_version()}, this package knows {ABI_VERSION}"
        raise UsageError(what, where=str(path), fix="compile the model again")
    return runtime


def _tensor(array: np.ndarray) -> _Tensor:
    code = CODES.get(array.dtype)
    if code is None or array.ndim > MAX_RANK:
        what = f"an array of {array.dtype.name} with {array.ndim} dimensions"
        raise DataError(what, fix=f"give one of {', '.join(DTYPES)}")
    # Field by field: a call takes tens of microseconds, of which building arrays of ctypes would be a good part.
    found = _Tensor()
    found.dtype, found.rank = code, array.ndim
    found.shape[: array.ndim] = array.shape
    found.data, found.bytes = array.ctypes.data, array.nbytes
    return found
