"""The runnable part of a bundle: the library's interface, the runner and TVM's runtime libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from bitwright.compiler.bundle.model_text import MODEL_TEXT_FILE, model_text
from bitwright.compiler.bundle.segments import SEGMENTS_FILE, SegmentList, read_segments
from bitwright.compiler.errors import ToolchainError
from bitwright.targets.backend import backend_for
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.cpu_backend import CpuBackend
from bitwright.targets.toolchain.interface import Interface
from bitwright.targets.toolchain.runner import LIBRARY_FILE, RUNTIME_LIBRARY, build_runner, copy_sources
from bitwright.targets.toolchain.runtime_libraries import CUDA_LIBRARY, LIBRARY_NAMES
from bitwright.targets.toolchain.shape_rules import ShapeRules
from bitwright.targets.toolchain.static_library import archive_model

README = """# Running this model without Python

From C or C++: include/bitwright_runtime.h, whose first lines show how; link with -lbitwright_runtime.

    c++ -std=c++17 -O2 -Iinclude example.cc -o example -L. -lbitwright_runtime \\
        -Wl,--allow-shlib-undefined -Wl,-rpath,'$ORIGIN'
    ./example . OUTPUT_FOLDER INPUT_0.npy ...

With CMake: CMakeLists.txt builds the same, or `add_subdirectory` of this folder gives `bitwright::runtime`. A program
needs at run time model.txt, model.so, libbitwright_runtime.so, libtvm_runtime.so and libtvm_ffi.so, and the system's
libstdc++. To build the runtime on the device:

    c++ -std=c++17 -O2 -fno-exceptions -fno-rtti -fvisibility=hidden -fPIC -shared -Iinclude bitwright_runtime.cc \\
        -o libbitwright_runtime.so -L. -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi -lpthread -ldl -Wl,-rpath,'$ORIGIN'

`runner` is what `bitwright verify` calls: it reads .npy files in the order of interface.json, writes output_K.npy, and
can time and record every kernel (the first lines of runner.cc say how).
"""
STATIC_README = """
## This model in a program

lib{name}.a holds kernels, weights and their description; `bw_open_embedded(&{name}, &model)` of {name}.h opens it. No
file of this folder but the shared libraries is needed at run time then (TVM's runtime exists only as such):

    c++ -std=c++17 -O2 -Iinclude -DBITWRIGHT_STATIC_MODEL={name} '-DBITWRIGHT_STATIC_HEADER="{name}.h"' example.cc \\
        -o example_static -L. -l{name} -lbitwright_runtime -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi \\
        -Wl,--allow-shlib-undefined -Wl,-rpath,'$ORIGIN'
"""
CUDA_README = """
## This model on a GPU

model.so holds machine code for the GPU that the model was compiled for, and calls it through TVM's runtime for CUDA,
libtvm_runtime_cuda.so, which needs NVIDIA's driver and libcudart.so.13 (CUDA 13). `bw_open` loads it; the runner wants

    ./runner model.so OUTPUT_FOLDER --device cuda [--repeat 100] INPUT_0.npy ...

kernels.cu is the source of the kernels, resources.json what ptxas says each of them takes. `emulation` holds the same
kernels for the processor of the machine that compiled the model; it is what `bitwright verify` executes, and is not
needed on the GPU's machine.
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


@dataclass(frozen=True)
class ShippedFile:
    """A file that a program needs at run time.

    Attributes:
        name: Path below the bundle's ``lib``.
        bytes: Its size.
        what: ``"model"``; ``"runtime"``, which serves every model; ``"archive"``, the model once more, to be linked.
    """

    name: str
    bytes: int
    what: str


def shipped_files(lib: Path, static: str | None = None) -> tuple[ShippedFile, ...]:
    """Return what of a finished ``lib`` folder a program needs at run time, the model first.

    Args:
        lib: The folder.
        static: Name of its static archive, if there is one; it comes last.
    """
    segments = read_segments(lib)
    parts = [LIBRARY_FILE] if segments is None else [SEGMENTS_FILE]
    for segment in () if segments is None else segments.segments:
        library = segment.executor == "kernels"
        parts.append(f"{segment.path}/{LIBRARY_FILE}" if library else segment.path)
    kinds = [(name, "model") for name in (*parts, MODEL_TEXT_FILE)]
    libraries = (RUNTIME_LIBRARY, *(f"lib{n}.so" for n in LIBRARY_NAMES), CUDA_LIBRARY)
    kinds += [(name, "runtime") for name in libraries]
    kinds += [(f"lib{static}.a", "archive")] if static else []
    return tuple(
        ShippedFile(name, (lib / name).stat().st_size, what) for name, what in kinds if (lib / name).exists()
    )


def add_runtime(
    lib: Path,
    profile: Profile,
    interface: Interface,
    rules: ShapeRules | None = None,
    static: str | None = None,
) -> RunnerStatus:
    """Complete the ``lib`` folder of a bundle that already holds ``model.so``, or segments.json and its segments.

    A missing compiler or missing runtime libraries leave the bundle without a runner; the source and the
    build line are there in any case, and the status says why.

    Args:
        lib: The folder.
        profile: Target.
        interface: Of the whole model.
        rules: Its shapes, if it has several.
        static: Name of the static archive in ``lib``, if there is one.
    """
    interface.write(lib)
    copy_runtime_sources(lib, static or "model")
    segments = read_segments(lib)
    text = text_of(profile, interface, rules, library=lib / LIBRARY_FILE, segments=segments)
    (lib / MODEL_TEXT_FILE).write_text(text)
    extra = SEGMENTS_README if segments else STATIC_README.format(name=static) if static else ""
    cuda = profile.codegen.kind == "cuda"
    (lib / "README.md").write_text(README + extra + (CUDA_README if cuda else ""))
    try:
        compiler = build_runner(lib, profile.toolchain.triple, cuda=cuda)
        return RunnerStatus(compiler=compiler, missing=None)
    except ToolchainError as error:
        return RunnerStatus(compiler=None, missing=error.message)


def copy_runtime_sources(lib: Path, archive: str) -> None:
    """Put the sources of runner and C runtime, their headers and CMakeLists.txt into ``lib``."""
    with as_file(files("bitwright.compiler.bundle") / "runner") as sources:
        copy_sources(sources, lib)
        template = (sources / "CMakeLists.txt.in").read_text()
    (lib / "CMakeLists.txt").write_text(template.replace("@NAME@", archive))


def add_static(
    lib: Path,
    objects: Sequence[Path],
    profile: Profile,
    interface: Interface,
    rules: ShapeRules | None,
    name: str,
) -> None:
    """Write the model as ``libNAME.a`` with ``include/NAME.h`` into ``lib``.

    Raises:
        ToolchainError: A tool is missing or failed.
    """
    copy_runtime_sources(lib, name)
    text = text_of(profile, interface, rules, library=None)
    archive_model(objects, lib, name, text, profile.toolchain.triple)


def text_of(
    profile: Profile,
    interface: Interface,
    rules: ShapeRules | None,
    *,
    library: Path | None,
    segments: SegmentList | None = None,
) -> str:
    """Return the content of model.txt for an artifact of a profile; arguments as for :func:`model_text`."""
    backend = backend_for(profile.family)
    flags = backend.flags(profile) if isinstance(backend, CpuBackend) else ()
    device = profile.codegen.kind if profile.codegen.kind == "cuda" else None
    threads = 1 if device else profile.cores  # one thread of the host launches kernels
    return model_text(
        interface, rules, flags=flags, threads=threads, library=library, segments=segments, device=device
    )
