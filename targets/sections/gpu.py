"""What a graphics processor has that other processors do not."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bitwright.targets.sections.record import Count, Strict


class Gpu(Strict):
    """The limits that kernels are built within.

    Attributes:
        architecture: Code generation target, e.g. ``sm_87``.
        multiprocessors: Streaming multiprocessors.
        shared_bytes_per_block: Most shared memory of one thread block.
        shared_bytes_per_multiprocessor: Shared memory of all blocks on a multiprocessor.
        registers_per_multiprocessor: 32-bit registers of all threads on a multiprocessor.
        threads_per_multiprocessor, blocks_per_multiprocessor: Most that are resident at a time.
        registers_per_thread: Most registers of a thread.
        threads_per_block: Most threads of a block.
    """

    architecture: Annotated[str, Field(pattern=r"^sm_[0-9]{2,3}a?$")]
    multiprocessors: Count
    shared_bytes_per_block: Count
    shared_bytes_per_multiprocessor: Count
    registers_per_multiprocessor: Count = 65536
    threads_per_multiprocessor: Count = 2048
    blocks_per_multiprocessor: Count = 32
    registers_per_thread: Count = 255
    threads_per_block: Count = 1024
