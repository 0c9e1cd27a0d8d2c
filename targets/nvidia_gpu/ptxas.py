"""What ptxas says about kernels: registers, spills, shared memory; checked against the profile's processor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.sections.gpu import Gpu

_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
REGISTER_FILE = 65536
# Registers are handed to warps in pieces of this many a thread.
REGISTER_STEP = 8


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    Attributes:
        name: The kernel.
        registers: Of a thread.
        spill_bytes: Stored to and loaded from local memory because registers ran out, both together.
        stack_bytes: Local memory of a thread.
        static_shared_bytes: Shared memory known to ptxas; what a launch asks for comes on top.
    """

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared_bytes: int


def read_resources(text: str) -> tuple[Resources, ...]:
    """Read the output of ``ptxas -v``.

    Raises:
        ToolchainError: It names a kernel without saying what that takes.
    """
    return tuple(
        _kernel(block) for block in re.split(r"(?=Compiling entry function)", text) if _ENTRY.match(block)
    )


def _kernel(block: str) -> Resources:
    entry, spills, used = _ENTRY.search(block), _SPILLS.search(block), _USED.search(block)
    if entry is None or spills is None or used is None:
        msg = "ptxas did not say what a kernel takes"
        raise ToolchainError(msg, where="ptxas -v", fix="use the ptxas of CUDA 12 or 13")
    stack, stores, loads = (int(part) for part in spills.groups())
    shared = _SHARED.search(block)
    return Resources(entry[1], int(used[1]), stores + loads, stack, int(shared[1]) if shared else 0)


def violations(
    resources: Resources, gpu: Gpu, threads: int, shared_bytes: int = 0, *, spills: bool = False
) -> Iterator[str]:
    """Yield what a kernel takes and the processor does not have.

    Args:
        resources: From ptxas.
        gpu: The profile's processor.
        threads: Of a block.
        shared_bytes: What a launch asks for.
        spills: Spilled registers are allowed.
    """
    total = resources.static_shared_bytes + shared_bytes
    most = min(gpu.registers_per_thread, registers_left(threads))
    if resources.registers > most:
        yield f"{resources.registers} registers, {most} possible with {threads} threads"
    if total > gpu.shared_bytes_per_block:
        yield f"{total} bytes of shared memory, a block has {gpu.shared_bytes_per_block}"
    if threads > gpu.threads_per_block:
        yield f"{threads} threads, a block has at most {gpu.threads_per_block}"
    if resources.spill_bytes and not spills:
        yield f"{resources.spill_bytes} bytes of spilled registers"


def registers_left(threads: int) -> int:
    """Return the most registers of a thread in a block of ``threads``."""
    return REGISTER_FILE // threads // REGISTER_STEP * REGISTER_STEP


def require_fitting(
    found: tuple[Resources, ...], gpu: Gpu, launches: Mapping[str, tuple[int, int]], *, spills: bool = False
) -> None:
    """Raise unless every kernel fits the processor.

    Args:
        found: What ptxas says.
        gpu: The profile's processor.
        launches: Kernel -> (threads of a block, shared memory asked for at launch).
        spills: Spilled registers are allowed.

    Raises:
        ToolchainError: A kernel does not fit, or was not compiled.
    """
    by_name = {resources.name: resources for resources in found}
    for name, (threads, shared) in launches.items():
        if name not in by_name:
            msg = f"ptxas compiled no kernel '{name}'"
            raise ToolchainError(msg, where="ptxas -v")
        wrong = list(violations(by_name[name], gpu, threads, shared, spills=spills))
        if wrong:
            msg = f"kernel '{name}' does not fit {gpu.architecture}: {'; '.join(wrong)}"
            raise ToolchainError(msg, where="ptxas -v", fix="choose a smaller tile")
