"""Choosing and calling a compiler driver: the system's own or cross one, else ziglang from pip."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.toolchain.cache import cache_folder
from bitwright.targets.toolchain.process import run_tool

# The oldest glibc a cross-built file may ask for; TVM's own wheels need 2.28.
GLIBC_FLOOR = "2.28"
LINK_TIMEOUT_S = 600.0
COMPILING = ("-std=c++17", "-O2", "-fno-exceptions", "-fno-rtti")


@dataclass(frozen=True)
class Driver:
    """A compiler driver that links and compiles for one machine.

    Attributes:
        command: Program and the arguments that select the machine.
        is_zig: It is ziglang's clang, which keeps its C runtime in a cache.
    """

    command: tuple[str, ...]
    is_zig: bool = False

    def version(self) -> str:
        """Return one line with the tool's name and version."""
        if self.is_zig:
            return (
                "zig "
                + self.run([sys.executable, "-m", "ziglang", "version"], "asking zig's version").strip()
            )
        text = self.run([self.command[0], "--version"], "asking the compiler's version")
        return text.splitlines()[0].strip()

    def run(self, command: Sequence[str], what: str) -> str:
        """Run a command in this driver's environment and return its standard output."""
        folder = str(cache_folder("zig")) if self.is_zig else ""
        variables = {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder} if self.is_zig else {}
        return run_tool(command, what=what, timeout_s=LINK_TIMEOUT_S, environment=variables)


def machine_of(triple: str) -> str:
    """Return the processor of a triple such as ``aarch64-linux-gnu``."""
    return triple.split("-")[0]


def is_native(triple: str) -> bool:
    """Tell whether this machine runs programs of ``triple`` itself."""
    return platform.system() == "Linux" and platform.machine() == machine_of(triple)


def _first_program(names: Sequence[str]) -> str | None:
    return next((found for name in names if (found := shutil.which(name))), None)


def _zig(triple: str) -> Driver | None:
    if find_spec("ziglang") is None:
        return None
    target = f"{machine_of(triple)}-linux-gnu.{GLIBC_FLOOR}"
    return Driver((sys.executable, "-m", "ziglang", "cc", "-target", target), is_zig=True)


@cache
def find_driver(triple: str, language: str = "c") -> Driver:
    """Return the compiler driver for a machine.

    Args:
        triple: ``x86_64-linux-gnu`` or ``aarch64-linux-gnu``.
        language: ``"c"`` to link, ``"c++"`` to compile the runner.

    Raises:
        ToolchainError: There is none.
    """
    native = {"c": ("cc", "gcc", "clang"), "c++": ("c++", "g++", "clang++")}[language]
    cross = {"c": "gcc", "c++": "g++"}[language]
    prefix = f"{machine_of(triple)}-linux-gnu-"
    program = _first_program(native if is_native(triple) else (prefix + cross,))
    driver = Driver((program,)) if program else _zig(triple)
    if driver is None:
        wanted = "a C compiler" if is_native(triple) else f"'{prefix}{cross}'"
        msg = f"no linker for {triple}: neither {wanted} nor ziglang is installed"
        raise ToolchainError(
            msg,
            fix="pip install ziglang (or 'bitwright[link]')",
        )
    return driver


def link_shared(objects: Sequence[Path], library: Path, triple: str) -> str:
    """Link object files into a shared library.

    Args:
        objects: Object files, in link order.
        library: File to write.
        triple: The machine it is for.

    Returns:
        The tool's name and version.

    Raises:
        ToolchainError: No linker, or it failed.
    """
    driver = find_driver(triple)
    command = [*driver.command, "-shared", "-fPIC", *map(str, objects), "-o", str(library)]
    driver.run(command, f"linking {library.name}")
    return driver.version()


def build_program(
    source: Path, program: Path, triple: str, *, include: Path, libraries: Path, names: Sequence[str]
) -> str:
    """Compile one C++17 file that uses no C++ standard library.

    Args:
        source: The file.
        program: Executable to write; at run time it looks for its libraries beside itself.
        triple: The machine it is for.
        include: Folder of headers.
        libraries: Folder with the shared libraries ``lib<name>.so``.
        names: The libraries' names.

    Returns:
        The tool's name and version.

    Raises:
        ToolchainError: No compiler, or it failed.
    """
    driver = find_driver(triple, "c++")
    link = _linking(libraries, names)
    command = [*driver.command, *COMPILING, f"-I{include}", str(source), "-o", str(program), *link]
    driver.run(command, f"compiling {source.name}")
    return driver.version()


def build_shared(
    source: Path, library: Path, triple: str, *, include: Path, libraries: Path, names: Sequence[str]
) -> str:
    """Compile one C++17 file into a shared library that exports only what it marks as such.

    Arguments, result and errors are those of :func:`build_program`.
    """
    driver = find_driver(triple, "c++")
    flags = [*COMPILING, "-shared", "-fPIC", "-fvisibility=hidden", f"-I{include}"]
    link = [f"-Wl,-soname,{library.name}", *_linking(libraries, names), "-lpthread"]
    driver.run([*driver.command, *flags, str(source), "-o", str(library), *link], f"compiling {source.name}")
    return driver.version()


def compile_object(source: Path, target: Path, triple: str, *, include: Path) -> str:
    """Compile one C or C++17 file into an object file for any program; as :func:`build_program` otherwise."""
    is_c = source.suffix == ".c"
    driver = find_driver(triple, "c" if is_c else "c++")
    flags = ["-O2", "-fPIC"] if is_c else [*COMPILING, "-fPIC"]
    command = [*driver.command, *flags, f"-I{include}", "-c", str(source), "-o", str(target)]
    driver.run(command, f"compiling {source.name}")
    return driver.version()


def _linking(libraries: Path, names: Sequence[str]) -> list[str]:
    link = [f"-L{libraries}", "-Wl,--no-as-needed", *(f"-l{name}" for name in names)]
    # The libraries' own needs (libstdc++) are the run-time system's business, not this linker's.
    return [*link, "-ldl", "-Wl,--allow-shlib-undefined", "-Wl,-rpath,$ORIGIN"]
