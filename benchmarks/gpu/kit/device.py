"""CUDA's driver and runtime through ctypes: memory, launches and times, without any package."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DRIVER, RUNTIME = "libcuda.so.1", "libcudart.so.13"
TO_DEVICE, TO_HOST = 1, 2
MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DEFAULT_SHARED = 49152


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


def _load() -> ctypes.CDLL:
    """Load the driver, and CUDA's runtime: the system's, else the one in this folder; returns all symbols."""
    ctypes.CDLL(DRIVER, mode=ctypes.RTLD_GLOBAL)
    try:
        ctypes.CDLL(RUNTIME, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        ctypes.CDLL(str(Path(__file__).parent / "runtime" / RUNTIME), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(None)


class Device:
    """The first GPU of this machine.

    Raises:
        RuntimeError: CUDA reports an error.
        OSError: There is no driver.
    """

    def __init__(self) -> None:
        self._cuda = _load()
        self._cuda.cudaGetErrorString.restype = ctypes.c_char_p
        self._must(self._cuda.cudaSetDevice(0), "cudaSetDevice")
        self._must(self._cuda.cudaFree(None), "starting the device")
        self._stream = ctypes.c_void_p()
        self._must(self._cuda.cudaStreamCreate(ctypes.byref(self._stream)), "cudaStreamCreate")

    def _must(self, code: int, what: str) -> None:
        if code:
            message = f"{what}: error {code}, {self._cuda.cudaGetErrorString(code).decode()}"
            raise RuntimeError(message)

    def name(self) -> str:
        """Return what the driver calls the device."""
        text = ctypes.create_string_buffer(256)
        self._must(self._cuda.cuDeviceGetName(text, 256, 0), "cuDeviceGetName")
        return text.value.decode()

    def upload(self, array: np.ndarray) -> ctypes.c_void_p:
        """Copy an array to the device."""
        array = np.ascontiguousarray(array)
        at = ctypes.c_void_p()
        size = ctypes.c_size_t(array.nbytes)
        self._must(self._cuda.cudaMalloc(ctypes.byref(at), size), "cudaMalloc")
        source = ctypes.c_void_p(array.ctypes.data)
        self._must(
            self._cuda.cudaMemcpyAsync(at, source, size, TO_DEVICE, self._stream), "copying to the device"
        )
        self.wait()
        return at

    def download(self, at: ctypes.c_void_p, into: np.ndarray) -> None:
        """Copy from the device into an array."""
        target, size = ctypes.c_void_p(into.ctypes.data), ctypes.c_size_t(into.nbytes)
        self._must(
            self._cuda.cudaMemcpyAsync(target, at, size, TO_HOST, self._stream), "copying from the device"
        )
        self.wait()

    def release(self, at: ctypes.c_void_p) -> None:
        """Free memory."""
        self._must(self._cuda.cudaFree(at), "cudaFree")

    def wait(self) -> None:
        """Wait until the device has done everything."""
        self._must(self._cuda.cudaStreamSynchronize(self._stream), "the device")

    def load(self, code: bytes) -> ctypes.c_void_p:
        """Load machine code."""
        module = ctypes.c_void_p()
        self._must(self._cuda.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        return module

    def kernel(self, module: ctypes.c_void_p, launch: Mapping[str, Any]) -> Kernel:
        """Return a kernel of loaded code with the extents of a launch record."""
        function = ctypes.c_void_p()
        name = launch["kernel"].encode()
        self._must(
            self._cuda.cuModuleGetFunction(ctypes.byref(function), module, name), f"kernel {name.decode()}"
        )
        if launch["shared_bytes"] > DEFAULT_SHARED:
            code = self._cuda.cuFuncSetAttribute(function, MOST_SHARED, launch["shared_bytes"])
            self._must(code, "asking for shared memory")
        return Kernel(self, function, launch)

    def launch(self, function: ctypes.c_void_p, config: LaunchConfig, pointers: Any) -> None:
        """Start a kernel."""
        config.stream = self._stream
        self._must(self._cuda.cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), "launching")

    def microseconds(
        self, kernel: Kernel, arguments: Sequence[ctypes.c_void_p], calls: int, rounds: int
    ) -> list[float]:
        """Return, for each round, the time of one of ``calls`` launches; a round before them warms up.

        The launches of a round are one graph: Python would take longer to make them than small kernels to run.
        """
        graph = self._captured(kernel, arguments, calls)
        start, end = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (start, end):
            self._must(self._cuda.cudaEventCreate(ctypes.byref(event)), "cudaEventCreate")
        found = []
        for _ in range(rounds + 1):
            self._must(self._cuda.cudaEventRecord(start, self._stream), "cudaEventRecord")
            self._must(self._cuda.cudaGraphLaunch(graph, self._stream), "cudaGraphLaunch")
            self._must(self._cuda.cudaEventRecord(end, self._stream), "cudaEventRecord")
            self._must(self._cuda.cudaEventSynchronize(end), "the device")
            elapsed = ctypes.c_float()
            code = self._cuda.cudaEventElapsedTime(ctypes.byref(elapsed), start, end)
            self._must(code, "cudaEventElapsedTime")
            found.append(elapsed.value * 1e3 / calls)
        self._must(self._cuda.cudaGraphExecDestroy(graph), "cudaGraphExecDestroy")
        return found[1:]

    def _captured(self, kernel: Kernel, arguments: Sequence[ctypes.c_void_p], calls: int) -> ctypes.c_void_p:
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._must(self._cuda.cudaStreamBeginCapture(self._stream, 0), "cudaStreamBeginCapture")
        for _ in range(calls):
            kernel(arguments)
        code = self._cuda.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        self._must(code, "cudaStreamEndCapture")
        flags = ctypes.c_ulonglong(0)
        code = self._cuda.cudaGraphInstantiate(ctypes.byref(executable), graph, flags)
        self._must(code, "cudaGraphInstantiate")
        self._must(self._cuda.cudaGraphDestroy(graph), "cudaGraphDestroy")
        return executable


class Kernel:
    """A function of loaded code and how it is launched."""

    def __init__(self, device: Device, function: ctypes.c_void_p, launch: Mapping[str, Any]) -> None:
        self._device, self._function = device, function
        self._config = LaunchConfig()
        self._config.grid = (ctypes.c_uint * 3)(*launch["grid"])
        self._config.block = (ctypes.c_uint * 3)(*launch["block"])
        self._config.shared = launch["shared_bytes"]

    def __call__(self, arguments: Sequence[ctypes.c_void_p]) -> None:
        """Start it on pointers to device memory, in the order of its parameters."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._device.launch(self._function, self._config, pointers)
