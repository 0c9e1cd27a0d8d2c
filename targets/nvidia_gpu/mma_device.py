"""Calls from TensorIR into ``device.cuh``, and the frames of a thread block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from tvm import tirx
from tvm.backend.cuda.op import cuda_func_call
from tvm.ir import StringImm
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Buffer, Expr

DEVICE_SOURCE = Path(__file__).with_name("device.cuh")
WARP = 32
# What the swizzled matrices of wgmma are aligned to.
ATOM_BYTES = 1024
BLOCK_AXES = ("blockIdx.x", "blockIdx.y", "blockIdx.z")


@cache
def device_source() -> StringImm:
    """Return the text of ``device.cuh``; it has an include guard, for sources of several kernels."""
    return StringImm(DEVICE_SOURCE.read_text())


def declare_device() -> None:
    """Emit what brings ``device.cuh`` into the kernel's source; every kernel does it once."""
    T.evaluate(cuda_func_call("bw_declare", source_code=device_source()))


def value(name: str, *arguments: Expr, dtype: str) -> Expr:
    """Return a call of a device function that computes something."""
    return cuda_func_call(name, *arguments, source_code="", return_type=dtype)


def act(name: str, *arguments: Expr) -> None:
    """Emit a call of a device function for what it does."""
    T.evaluate(cuda_func_call(name, *arguments, source_code=""))


def pointer(buffer: Buffer, index: Expr) -> Expr:
    """Return the address of an element of a flat buffer."""
    return tirx.address_of(buffer[index])


@contextmanager
def thread_block(blocks: Sequence[int], threads: int) -> Iterator[tuple[list[Expr], Expr]]:
    """Open a kernel launch; yields (the block's indices, the thread's index).

    Args:
        blocks: Grid extents along x, y, z; one index is yielded for each.
        threads: Threads of a block.
    """
    with ExitStack() as frames:
        block = [
            frames.enter_context(T.launch_thread(axis, extent))
            for axis, extent in zip(BLOCK_AXES, blocks, strict=False)
        ]
        thread = frames.enter_context(T.launch_thread("threadIdx.x", threads))
        declare_device()
        yield block, thread


def shared_bytes(size: int) -> Buffer:
    """Allocate a block's shared memory as bytes, all of it in one buffer.

    Its size is asked for at launch, which alone may exceed 48 KiB. What lies where in it is the template's business,
    so no pass can see overlaps or put barriers of its own.
    """
    buffer = T.alloc_buffer((size,), "int8", scope="shared.dyn", layout=None, align=ATOM_BYTES)
    act("bw_keep", pointer(buffer, 0), pointer(buffer, size - 1))
    return buffer


def registers(length: int, dtype: str) -> Buffer:
    """Allocate registers of one thread; every index must be known when the kernel is compiled."""
    buffer = T.alloc_buffer((length,), dtype, scope="local", layout=None, align=16)
    act("bw_keep", pointer(buffer, 0), pointer(buffer, length - 1))
    return buffer
