"""Products by warp groups: four warps multiply 64 rows straight from shared memory (Hopper, ``sm_90a``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm.backend.cuda.op import cuda_func_call
from tvm.ir import StringImm
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, store
from bitwright.targets.nvidia_gpu.mma_device import WARP, act, device_source, pointer, registers
from bitwright.targets.nvidia_gpu.mma_engine import Pair
from bitwright.targets.nvidia_gpu.mma_tiles import LINE, Tiling

WARPS, ROWS = 4, 64
# Bytes of the reduction of one instruction; a row of a stage holds four of them, which is what the swizzle wants.
STEP = 32
COLUMNS = (64, 128, 256)


def wgmma_source(columns: int) -> str:
    """Return the device functions of one width: the products of a stage, and waiting for them."""
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+r"(d[{i}])' for i in range(count))
    steps = range(LINE // STEP)
    name = f"wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8"
    products = "".join(
        f'      "{name} {{{sums}}}, %{count + 2 * k}, %{count + 2 * k + 1}, keep;\\n"\n' for k in steps
    )
    # A step of 32 bytes along the reduction is 2 in the descriptor's units of 16.
    matrices = ", ".join(f'"l"(a + {2 * k}), "l"(b + {2 * k})' for k in steps)
    return f"""BW_DEVICE void bw_declare_wgmma_{columns}() {{}}
BW_DEVICE void bw_wgmma_s8_{columns}(void* sums, const void* left, const void* right) {{
  int* d = static_cast<int*>(sums);
  const unsigned long long a = bw_matrix(left), b = bw_matrix(right);
  asm volatile(
      "{{\\n.reg .pred keep;\\nsetp.eq.s32 keep, 0, 0;\\n"
      "wgmma.fence.sync.aligned;\\n"
{products}      "wgmma.commit_group.sync.aligned;\\n}}\\n"
      : {operands}
      : {matrices}
      : "memory");
}}
BW_DEVICE void bw_wgmma_wait_{columns}(void* sums) {{
  int* d = static_cast<int*>(sums);
  asm volatile("wgmma.wait_group.sync.aligned 0;\\n" : {operands} : : "memory");
}}
"""


@dataclass(frozen=True)
class WgmmaEngine:
    """Tensor cores fed from shared memory: every warp group multiplies 64 rows by ``warp_n`` columns.

    Attributes:
        tiling: The cut: ``warp_m`` is 16, ``warp_n`` a width of the instruction, ``block_k`` 128 bytes.
    """

    tiling: Tiling

    def _corner(self, thread: Expr) -> tuple[Expr, Expr]:
        """Return the first row and column of the thread's warp group in the block's tile."""
        group, across = thread // (WARP * WARPS), self.tiling.block_n // self.tiling.warp_n
        return group // across * ROWS, group % across * self.tiling.warp_n

    @property
    def is_asynchronous(self) -> bool:
        """Products are under way until they are waited for."""
        return True

    def start(self) -> Buffer:
        """Emit and return the accumulators, set to 0."""
        # Sources come in any order: each brings what it is built on, behind its include guard.
        source = StringImm(f"{device_source().value}\n{wgmma_source(self.tiling.warp_n)}")
        T.evaluate(cuda_func_call(f"bw_declare_wgmma_{self.tiling.warp_n}", source_code=source))
        sums = registers(self.tiling.warp_n // 2, "int32")
        for index in range(self.tiling.warp_n // 2):
            store(sums, T.int32(0), [index])
        return sums

    def publish(self) -> None:
        """Emit the fence between copies by threads and reads by the tensor cores."""
        act("bw_publish")

    def multiply(self, shared: Buffer, at: Expr, thread: Expr, sums: Buffer) -> None:
        """Issue the products of the stage that begins at byte ``at``."""
        t, (top, left) = self.tiling, self._corner(thread)
        rows = pointer(shared, at + top * t.block_k)
        columns = pointer(shared, at + (t.block_m + left) * t.block_k)
        act(f"bw_wgmma_s8_{t.warp_n}", pointer(sums, 0), rows, columns)

    def wait(self, sums: Buffer) -> None:
        """Emit the end of the products."""
        act(f"bw_wgmma_wait_{self.tiling.warp_n}", pointer(sums, 0))

    def pairs(self, thread: Expr) -> Iterator[Pair]:
        """Yield the accumulators of a thread, column by column."""
        top, left = self._corner(thread)
        warp, lane = thread // WARP % WARPS, thread % WARP
        for j in range(self.tiling.warp_n // 8):
            column = left + j * 8 + lane % 4 * 2
            for half in range(2):
                yield Pair(top + warp * 16 + half * 8 + lane // 4, column, 4 * j + 2 * half)
