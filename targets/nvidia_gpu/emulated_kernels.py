"""All kernels of a module as one library for this machine's processor, for the emulated driver."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from bitwright.targets.nvidia_gpu import emulation
from bitwright.targets.toolchain.process import run_tool

_SIGNATURE = re.compile(r'extern "C" __global__ void\s*(?:__launch_bounds__\([^)]*\))?\s*(\w+)\(([^)]*)\)')

_ALIGNED = re.compile(r"__shared__ (alignas\(\d+\)) ")


def build_kernels(source: str, library: Path) -> None:
    """Compile the CUDA source of a module's kernels for this machine.

    Args:
        source: What nvcc got.
        library: File to write: for every kernel ``bw_run_NAME`` and the number of its arguments, ``bw_count_NAME``.

    Raises:
        ToolchainError: No C++ compiler, or it failed.
    """
    kernels = {name: parameters.count(",") + 1 for name, parameters in _SIGNATURE.findall(source)}
    # nvcc takes the alignment behind the storage class; the standard has it in front.
    text = emulation.host_source(_ALIGNED.sub(r"\1 __shared__ ", source), tuple(kernels))
    counts = "".join(f'extern "C" const int bw_count_{name} = {count};\n' for name, count in kernels.items())
    compiler = emulation.compiler()
    assert compiler is not None  # the linker before has found one
    with tempfile.TemporaryDirectory(prefix="bitwright-") as name:
        work = Path(name)
        (work / "kernels.cc").write_text(f"{text}\n{counts}")
        command = [compiler, *emulation.FLAGS, "-o", "kernels.so", "kernels.cc", "-lm"]
        run_tool(
            command, what="compiling kernels for emulation", timeout_s=emulation.COMPILE_SECONDS, folder=work
        )
        shutil.copyfile(work / "kernels.so", library)
