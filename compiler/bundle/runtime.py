"""The runnable part of a bundle: the library's interface, the runner and TVM's runtime libraries."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from bitwright.compiler.bundle.segments import SEGMENTS_FILE
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
SEGMENTS_README = """
## This model in segments

Some operators could not be compiled (`not_lowered` in segments.json says which and why), so there is no single
`model.so`. segments.json lists the segments in execution order. A folder `segment_K` holds a library with its
interface.json and roles.txt, which the runner runs as above:

    ./runner segment_0/model.so OUTPUT_FOLDER [--trace FILE segment_0/roles.txt] INPUT_0.npy ...

A file `segment_K.onnx` is run by ONNX Runtime. A segment's inputs are inputs of the model or outputs of earlier
segments, by name. The runner runs one library at a time; running all segments is the caller's part, or that of
`bitwright.Bundle.open(FOLDER).run(...)`.
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
    """Complete the ``lib`` folder of a bundle that already holds ``model.so``, or segments.json and its segments.

    A missing compiler or missing runtime libraries leave the bundle without a runner; the source and the
    build line are there in any case, and the status says why.
    """
    interface.write(lib)
    with as_file(files("bitwright.compiler.bundle") / "runner" / "runner.cc") as source:
        copy_source(source, lib)
    segments = (lib / SEGMENTS_FILE).exists()
    (lib / "README.md").write_text(README + (SEGMENTS_README if segments else ""))
    try:
        return RunnerStatus(compiler=build_runner(lib, profile.toolchain.triple), missing=None)
    except ToolchainError as error:
        return RunnerStatus(compiler=None, missing=error.message)
