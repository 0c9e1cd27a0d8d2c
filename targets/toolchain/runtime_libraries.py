"""TVM's two runtime libraries for any machine: from the installed wheels or from that machine's."""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.toolchain.cache import cache_folder
from bitwright.targets.toolchain.linker import is_native, machine_of
from bitwright.targets.toolchain.process import run_tool

LIBRARY_NAMES = ("tvm_runtime", "tvm_ffi")
CUDA_LIBRARY = "libtvm_runtime_cuda.so"
# Package that holds each library, and the library's path inside its wheel.
MEMBERS = {
    "apache-tvm": "tvm/lib/libtvm_runtime.so",
    "apache-tvm-ffi": "tvm_ffi/lib/libtvm_ffi.so",
}
CUDA_MEMBER = f"tvm/lib/{CUDA_LIBRARY}"
# pip matches a wheel's glibc tag exactly, so every tag that the two projects use is named.
GLIBC_TAGS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux2014", "manylinux_2_17")
DOWNLOAD_TIMEOUT_S = 900.0


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises:
        ToolchainError: It is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        msg = f"the Python package '{name}' is not installed"
        raise ToolchainError(msg, fix="pip install bitwright")
    return Path(next(iter(spec.submodule_search_locations)))


def header_folder() -> Path:
    """Return the folder that holds ``tvm/ffi/c_api.h`` and ``dlpack/dlpack.h``."""
    return package_folder("tvm_ffi") / "include"


def runtime_libraries(triple: str) -> tuple[Path, ...]:
    """Return the paths of ``libtvm_runtime.so`` and ``libtvm_ffi.so`` for a machine.

    For another machine its wheels, of the installed versions, are downloaded once (about 100 MB) and only the
    two libraries are kept.

    Raises:
        ToolchainError: They cannot be downloaded.
    """
    return _libraries(triple, tuple(MEMBERS.values()), cached_folder(triple))


def cuda_library(triple: str) -> Path:
    """Return the path of TVM's runtime for CUDA, ``libtvm_runtime_cuda.so``, for a machine.

    Raises:
        ToolchainError: It cannot be downloaded, or there is none for that machine.
    """
    folder = cached_folder(triple)
    (found,) = _libraries(triple, (CUDA_MEMBER,), folder.with_name(f"{folder.name}-cuda"))
    if not found.exists():
        msg = f"TVM's wheel for {triple} holds no {CUDA_LIBRARY}"
        raise ToolchainError(msg, fix=f"build it from TVM's source, and put it into {found.parent}")
    return found


def _libraries(triple: str, members: tuple[str, ...], folder: Path) -> tuple[Path, ...]:
    if is_native(triple):
        return tuple(package_folder(Path(m).parts[0]).parent / m for m in members)
    found = tuple(folder / Path(member).name for member in members)
    if not all(path.exists() for path in found):
        _download(triple, folder, members)
    return found


def cached_folder(triple: str) -> Path:
    """Return where the libraries of another machine are kept (the folder may not exist yet)."""
    label = "-".join(version(package) for package in MEMBERS)
    return cache_folder("runtime") / f"{machine_of(triple)}-{label}"


def _download(triple: str, folder: Path, members: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        wheels, kept = Path(work, "wheels"), Path(work, "kept")
        kept.mkdir()
        try:
            run_tool(
                _pip_command(triple, wheels), what="downloading TVM's runtime", timeout_s=DOWNLOAD_TIMEOUT_S
            )
        except ToolchainError as error:
            msg = f"cannot get TVM's runtime libraries for {triple}: {error.what}"
            raise ToolchainError(
                msg,
                fix=f"run once with access to a package index, or put libtvm_runtime.so and libtvm_ffi.so "
                f"into {folder}",
            ) from error
        for wheel in wheels.glob("*.whl"):
            _extract(wheel, kept, members)
        # Two runs may download at once; whichever comes second finds the folder in place.
        if not folder.exists():
            kept.replace(folder)


def _pip_command(triple: str, folder: Path) -> list[str]:
    platforms = [f"--platform={tag}_{machine_of(triple)}" for tag in GLIBC_TAGS]
    wanted = [f"{package}=={version(package)}" for package in MEMBERS]
    python = f"--python-version={sys.version_info.major}.{sys.version_info.minor}"
    options = ["--only-binary=:all:", "--no-deps", "--implementation=cp", python, *platforms]
    return [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(folder), *wanted]


def _extract(wheel: Path, folder: Path, members: tuple[str, ...]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in set(members) & set(archive.namelist()):
            with archive.open(member) as source, (folder / Path(member).name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
