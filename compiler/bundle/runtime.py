"""The runnable part of a bundle: the library's interface, the runner and TVM's runtime libraries."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.interface import Interface
from bitwright.targets.toolchain.runner import build_runner, copy_source

README = """# Running this model without Python

`runner` loads `model.so`, reads .npy files in the order of interface.json and writes output_K.npy:

    ./runner model.so OUTPUT_FOLDER [--repeat N] [--trace FILE roles.txt] INPUT_0.npy ...

To build it on the device (TVM's libtvm_runtime.so and libtvm_ffi.so in this folder):

    c++ -std=c++17 -O2 -Iinclude runner.cc -o runner \\
        -L. -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi -Wl,-rpath,'$ORIGIN'

`--trace` writes, for every call of a kernel listed in roles.txt, the line `call NAME INPUTS` and then
INPUTS + 1 arrays in .npy format: the kernel's activation inputs and its output.
"""


@dataclass(frozen=True)
class RunnerStatus:
    """Whether the bundle got a runner for its target.

    Attributes:
        compiler: The compiler's name and version, or None.
        missing: Why there is no runner, or None.
    """

    compiler: str | None
    missing: str | None


def add_runtime(lib: Path, profile: Profile, interface: Interface) -> RunnerStatus:
    """Complete the ``lib`` folder of a bundle that already holds ``model.so``.

    A missing compiler or missing runtime libraries leave the bundle without a runner; the source and the
    build line are there in any case, and the status says why.
    """
    interface.write(lib)
    with as_file(files("bitwright.compiler.bundle") / "runner" / "runner.cc") as source:
        copy_source(source, lib)
    (lib / "README.md").write_text(README)
    try:
        return RunnerStatus(compiler=build_runner(lib, profile.toolchain.triple), missing=None)
    except ToolchainError as error:
        return RunnerStatus(compiler=None, missing=error.message)
