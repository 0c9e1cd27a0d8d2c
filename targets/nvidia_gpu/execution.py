"""Executing GPU artifacts on this machine's processor: the same kernels, emulated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitwright.targets.backend import Execution, Measurement
from bitwright.targets.nvidia_gpu.emulated_device import environment, runner_folder
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.host import native_triple
from bitwright.targets.toolchain.linker import link_shared
from bitwright.targets.toolchain.runner import LIBRARY_FILE, RUNNER_FILE, Launch, execute

# In the folder of a library.
EMULATION_FOLDER = "emulation"
KERNELS_FILE = "kernels.so"
# What nvcc got, and what ptxas says each kernel takes.
SOURCE_FILE, RESOURCES_FILE = "kernels.cu", "resources.json"
# Kernels of half-precision products are called so, with a number behind it.
HALF_PRODUCT = "half_product"
EXECUTED = "emulated (CPU emulation of the GPU kernels)"
RUN_TIMEOUT_S = 3600.0


def link(objects: Sequence[Path], library: Path, profile: Profile) -> str:
    """Link a library, and beside it what this machine executes in its place.

    ``lib`` gets ``kernels.cu`` and ``resources.json``; ``lib/emulation`` the kernels for this machine's processor and,
    where the target's host is another machine, the host's part of the library.
    """
    from bitwright.compiler.lower.device import HOST_OBJECTS
    from bitwright.targets.nvidia_gpu.emulated_kernels import build_kernels

    tool = link_shared(objects, library, profile.toolchain.triple)
    device = objects[0].parent / "device"
    place = library.parent / EMULATION_FOLDER
    place.mkdir()
    source = device / SOURCE_FILE
    if source.exists():  # a library may have no kernel at all
        for name in (SOURCE_FILE, RESOURCES_FILE):
            shutil.copyfile(device / name, library.parent / name)
        build_kernels(source.read_text(), place / KERNELS_FILE)
    host = device / HOST_OBJECTS
    if host.exists():
        link_shared(sorted(host.iterdir()), place / LIBRARY_FILE, native_triple())
    return tool


def why_not_executable() -> str | None:
    """Return why this machine cannot emulate kernels, or None if it can."""
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        return None
    return "the emulation of GPU kernels needs a C++ compiler (c++, g++ or clang++)"


def run(bundle: Path, feeds: Mapping[str, np.ndarray], *, trace: bool, library: str) -> Execution:
    """Run a library of a bundle on one set of inputs.

    Raises:
        DataError: ``feeds`` does not fit the model.
        ToolchainError: There is no C++ compiler, or the run failed.
    """
    lib = bundle.resolve() / "lib"
    # A further function of the library has a folder without a library of its own.
    place = lib / library if (lib / library / LIBRARY_FILE).exists() else lib
    kernels = place / EMULATION_FOLDER / KERNELS_FILE
    launch = Launch(
        prefix=(),
        environment=environment(kernels),
        executed=EXECUTED,
        timeout_s=RUN_TIMEOUT_S,
        options=("--device", "cuda"),
        runner=runner_folder() / RUNNER_FILE,
        library=Path(EMULATION_FOLDER, LIBRARY_FILE),
    )
    found = execute(bundle, feeds, launch, trace=trace, repeat=0, library=library)
    return replace(found, measurements=tuple(measurements(place / RESOURCES_FILE)))


def measurements(file: Path) -> Iterator[Measurement]:
    """Yield what ptxas says of a library's kernels."""
    if not file.exists():
        return
    kernels = json.loads(file.read_text())
    largest = max(kernels, key=lambda kernel: kernel["registers"], default=None)
    if largest is None:
        return
    spilled = sum(kernel["spill_bytes"] > 0 for kernel in kernels)
    detail = (
        f"kernel {largest['name']}; {spilled} of {len(kernels)} kernels spill registers; ptxas, not executed"
    )
    yield Measurement("Registers of a thread", f"at most {largest['registers']}", detail)
    halves = sum(kernel["name"].startswith(HALF_PRODUCT) for kernel in kernels)
    if halves:
        yield Measurement(
            "Half-precision products", f"{halves} kernels on tensor cores", "ptxas, not executed"
        )
