"""Calling single kernels of a library under the emulator, many in one start of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.cache import cache_folder
from bitwright.targets.toolchain.linker import build_program, machine_of
from bitwright.targets.toolchain.process import run_tool
from bitwright.targets.toolchain.runner import Launch
from bitwright.targets.toolchain.runtime_libraries import LIBRARY_NAMES, header_folder, runtime_libraries

SOURCE = Path(__file__).with_name("kernel_runner.cc")
DLPACK_CODES = {"i": 0, "u": 1, "f": 2}


@dataclass(frozen=True)
class KernelArguments:
    """One function of the library and what it is called with.

    Attributes:
        symbol: Name of the function.
        arrays: Its arguments in order; the last one is the output and is written to.
        times: How often it is called.
    """

    symbol: str
    arrays: Sequence[np.ndarray]
    times: int = 1


def runner(profile: Profile) -> Path:
    """Return the compiled runner for a profile's machine, beside TVM's runtime libraries; built the first time.

    Raises:
        ToolchainError: No compiler for that machine, or no runtime libraries.
    """
    triple = profile.toolchain.triple
    libraries = runtime_libraries(triple)
    label = sha256(SOURCE.read_bytes() + str(libraries[0]).encode()).hexdigest()[:16]
    folder = cache_folder("kernel-runner") / f"{machine_of(triple)}-{label}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            built = Path(work, "built")
            built.mkdir()
            for library in libraries:
                shutil.copyfile(library, built / library.name)
            build_program(
                SOURCE,
                built / "kernel_runner",
                triple,
                include=header_folder(),
                libraries=built,
                names=LIBRARY_NAMES,
            )
            if not folder.exists():  # another process may have been faster
                built.replace(folder)
    return folder / "kernel_runner"


def call_kernels(
    library: Path, calls: Sequence[KernelArguments], profile: Profile, launch: Launch
) -> list[np.ndarray]:
    """Call kernels in order, in one process; returns the outputs.

    Args:
        library: Shared library of packed functions.
        calls: What to call.
        profile: The machine it is for.
        launch: How programs of that machine are started here.

    Raises:
        ToolCrashError: A signal ended the process: SIGILL where the processor lacks an instruction.
        ToolchainError: The runner cannot be built, or the runtime reported an error.
    """
    program = runner(profile)
    with tempfile.TemporaryDirectory(prefix="bitwright-kernels-") as work:
        folder = Path(work)
        script = folder / "script"
        script.write_text("".join(_lines(folder, number, call) for number, call in enumerate(calls)))
        run_tool(
            [*launch.prefix, str(program), str(library), str(script)],
            what=f"calling the kernels of {library.name}",
            timeout_s=launch.timeout_s,
            environment={**launch.environment, "TVM_NUM_THREADS": "1"},
        )
        return [
            np.fromfile(folder / f"output_{number}", call.arrays[-1].dtype).reshape(call.arrays[-1].shape)
            for number, call in enumerate(calls)
        ]


def _lines(folder: Path, number: int, call: KernelArguments) -> str:
    lines = []
    for k, array in enumerate(call.arrays):
        path = folder / f"argument_{number}_{k}"
        np.ascontiguousarray(array).tofile(path)
        code, bits = DLPACK_CODES[array.dtype.kind], 8 * array.dtype.itemsize
        lines.append(f"array {code} {bits} {path} {array.ndim} {' '.join(map(str, array.shape))}")
    lines += [f"call {call.symbol} {call.times}", f"write {folder / f'output_{number}'}", "clear"]
    return "\n".join(lines) + "\n"
