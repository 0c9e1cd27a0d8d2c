"""A CUDA device on this machine's processor: the libraries that TVM's runtime takes for the driver and its runtime.

Machine code for a GPU cannot run here, so the same kernels are compiled from their CUDA source by the host's compiler
(``emulation``), and ``emulated_driver.cc`` launches them. The host's part of an artifact, its storage plan and its
captured graphs are executed as they are.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path

from bitwright.targets.toolchain.cache import cache_folder
from bitwright.targets.toolchain.host import native_triple
from bitwright.targets.toolchain.linker import find_driver
from bitwright.targets.toolchain.runner import build_runner, copy_sources

DRIVER_SOURCE = Path(__file__).with_name("emulated_driver.cc")
DRIVER, RUNTIME = "libcuda.so.1", "libcudart.so.13"
# TVM's runtime asks for these symbols by the version that NVIDIA gives them.
SYMBOLS = f"{RUNTIME} {{ global: cuda*; cu*; local: *; }};\n"
KERNELS_VARIABLE = "BITWRIGHT_EMULATED_KERNELS"


def driver_folder() -> Path:
    """Return the folder of the emulated driver's two libraries, built the first time.

    Raises:
        ToolchainError: No C++ compiler, or it failed.
    """
    compiler = find_driver(native_triple(), "c++")
    digest = hashlib.sha256(DRIVER_SOURCE.read_bytes() + repr(compiler.command).encode()).hexdigest()[:16]
    place = cache_folder("gpu-driver") / digest
    if not (place / DRIVER).exists():
        with tempfile.TemporaryDirectory(dir=place.parent) as name:
            work = Path(name)
            _build_driver(work)
            place.mkdir(exist_ok=True)
            for library in (RUNTIME, DRIVER):  # the one that is looked for comes last
                (work / library).replace(place / library)
    return place


def _build_driver(folder: Path) -> None:
    compiler = find_driver(native_triple(), "c++")
    (folder / "symbols.txt").write_text(SYMBOLS)
    (folder / "nothing.cc").write_text("")
    common = [*compiler.command, "-std=c++17", "-O2", "-fPIC", "-shared"]
    script = f"-Wl,--version-script={folder / 'symbols.txt'}"
    for library, source, extra in (
        (RUNTIME, DRIVER_SOURCE, ["-fvisibility=hidden", script]),
        (DRIVER, folder / "nothing.cc", []),
    ):
        command = [
            *common,
            *extra,
            f"-Wl,-soname,{library}",
            str(source),
            "-o",
            str(folder / library),
            "-ldl",
        ]
        compiler.run(command, f"compiling {library}")


def load_runtime() -> None:
    """Load TVM's runtime for CUDA into this process on top of the emulated driver.

    Without it TVM puts CUDA source instead of machine code into libraries. Does nothing if a real driver let it load.
    """
    import tvm
    from tvm.base import _LOADED_LIBS
    from tvm_ffi.libinfo import load_lib_ctypes

    if "tvm_runtime_cuda" in _LOADED_LIBS:
        return
    folder = driver_folder()
    for library in (RUNTIME, DRIVER):
        ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)
    place = Path(tvm.__file__).parent / "lib"
    _LOADED_LIBS["tvm_runtime_cuda"] = load_lib_ctypes(
        package="tvm", target_name="tvm_runtime_cuda", extra_lib_paths=[place], mode="RTLD_LOCAL"
    )


def runner_folder() -> Path:
    """Return a folder with the runner of bundles and TVM's libraries for this machine, built the first time.

    Raises:
        ToolchainError: No C++ compiler, or it failed.
    """
    with as_file(files("bitwright.compiler.bundle") / "runner") as sources:
        texts = b"".join(path.read_bytes() for path in sorted(sources.iterdir()) if path.is_file())
        label = hashlib.sha256(texts + version("apache-tvm").encode()).hexdigest()[:16]
        place = cache_folder("gpu-runner") / label
        if not place.exists():
            with tempfile.TemporaryDirectory(dir=place.parent) as name:
                work = Path(name, "runner")
                work.mkdir()
                copy_sources(sources, work)
                build_runner(work, native_triple(), cuda=True)
                if not place.exists():
                    work.replace(place)
    return place


def environment(kernels: Path) -> Mapping[str, str]:
    """Return the variables of a process that runs a library with the emulated device.

    Args:
        kernels: Library of emulated kernels.
    """
    earlier = os.environ.get("LD_LIBRARY_PATH")
    paths = [str(driver_folder()), *([earlier] if earlier else [])]
    return {"LD_LIBRARY_PATH": ":".join(paths), KERNELS_VARIABLE: str(kernels)}
