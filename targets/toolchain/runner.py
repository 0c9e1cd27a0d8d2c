"""Building the bundle's C++ runner and calling it as a child process."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.backend import Execution
from bitwright.targets.toolchain import linker
from bitwright.targets.toolchain.cache import cache_folder
from bitwright.targets.toolchain.interface import ROLES_FILE, Interface
from bitwright.targets.toolchain.linker import build_program, build_shared, machine_of
from bitwright.targets.toolchain.process import run_tool
from bitwright.targets.toolchain.runtime_libraries import (
    LIBRARY_NAMES,
    cached_folder,
    cuda_library,
    header_folder,
    runtime_libraries,
)
from bitwright.targets.toolchain.shape_rules import MAIN

LIBRARY_FILE = "model.so"
RUNNER_FILE = "runner"
RUNTIME_LIBRARY = "libbitwright_runtime.so"
RUNTIME_SOURCE, RUNNER_SOURCE = "bitwright_runtime.cc", "runner.cc"
PUBLIC_HEADER = "bitwright_runtime.h"
HEADERS = ("tvm/ffi/c_api.h", "dlpack/dlpack.h")


@dataclass(frozen=True)
class Launch:
    """How runner processes are started on this machine.

    Attributes:
        prefix: Emulator and its arguments, or empty.
        environment: Variables for the runner.
        executed: ``"native"`` or ``"emulated"``: what an Execution says.
        timeout_s: Seconds after which a run is given up.
        options: For the runner itself, e.g. the device.
        runner: The program; None is the one in the bundle.
        library: In the place of the bundle's own, if it is there: its path in the folder of the bundle's library.
    """

    prefix: tuple[str, ...]
    environment: Mapping[str, str]
    executed: str
    timeout_s: float
    options: tuple[str, ...] = ()
    runner: Path | None = None
    library: Path | None = None


def copy_sources(sources: Path, folder: Path) -> None:
    """Put the runner, the C runtime and the headers they need into ``folder``, for building them on any device."""
    for path in sorted(sources.glob("*.cc")) + sorted(sources.glob("*.h")):
        public = path.name == PUBLIC_HEADER
        target = folder / "include" / path.name if public else folder / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for header in HEADERS:
        target = folder / "include" / header
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(header_folder() / header, target)


def build_runner(folder: Path, triple: str, *, cuda: bool = False) -> str:
    """Add TVM's runtime libraries, the runner and the C runtime to a folder that holds their sources.

    They are the same for every model: they are compiled (1 to 2 s) only where these sources never were.

    Args:
        folder: The folder.
        triple: The machine they are for.
        cuda: Also add TVM's runtime for CUDA.

    Returns:
        The compiler's name and version.

    Raises:
        ToolchainError: No compiler, or no runtime libraries for that machine.
    """
    for library in (*runtime_libraries(triple), *([cuda_library(triple)] if cuda else [])):
        shutil.copyfile(library, folder / library.name)
    compiler = linker.find_driver(triple, "c++").version()
    built = _built_once(folder, triple, compiler)
    for made in (RUNTIME_LIBRARY, RUNNER_FILE):
        shutil.copy(built / made, folder / made)
    return compiler


def _built_once(folder: Path, triple: str, compiler: str) -> Path:
    """Return the folder that keeps what was built from these sources; it is built the first time."""
    place = cache_folder("runner") / _label(folder, triple, compiler)
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=place.parent) as work:
            built = Path(work, "built")
            built.mkdir()
            _build(folder, built, triple)
            if not place.exists():  # another process may have been faster
                built.replace(place)
    return place


def _label(folder: Path, triple: str, compiler: str) -> str:
    """Return what tells builds apart: sources, the compiler, how it is called, and what is linked with."""
    headers = [folder / "include" / name for name in (PUBLIC_HEADER, *HEADERS)]
    sources = [folder / RUNTIME_SOURCE, folder / RUNNER_SOURCE, *sorted(folder.glob("*.h")), *headers]
    parts = [*linker.find_driver(triple, "c++").command, compiler, cached_folder(triple).name]
    digest = sha256(json.dumps(parts).encode())
    for path in (*sources, Path(linker.__file__)):
        digest.update(sha256(path.read_bytes()).digest())
    return f"{machine_of(triple)}-{digest.hexdigest()[:24]}"


def _build(folder: Path, built: Path, triple: str) -> None:
    """Compile the sources in ``folder`` into ``built``."""
    for build, source, made in (
        (build_shared, RUNTIME_SOURCE, RUNTIME_LIBRARY),
        (build_program, RUNNER_SOURCE, RUNNER_FILE),
    ):
        include = folder / "include"
        build(folder / source, built / made, triple, include=include, libraries=folder, names=LIBRARY_NAMES)


def execute(
    bundle: Path,
    feeds: Mapping[str, np.ndarray],
    launch: Launch,
    *,
    trace: bool,
    repeat: int = 1,
    library: str = "",
) -> Execution:
    """Run a library once (and ``repeat`` timed times) on one set of inputs.

    Args:
        bundle: Its ``lib`` holds the runner.
        feeds: Input name -> array.
        launch: How the runner is started.
        trace: Record every kernel call.
        repeat: Timed runs.
        library: Folder in ``lib`` that holds the library and its interface; ``lib`` itself by default.

    Raises:
        DataError: ``feeds`` does not fit the model.
        ToolchainError: The bundle has no runner, or the run failed.
    """
    lib = bundle.resolve() / "lib"
    runner = launch.runner or lib / RUNNER_FILE
    if not runner.exists():
        msg = "the bundle has no runner for its target"
        raise ToolchainError(
            msg,
            where=str(bundle),
            fix="compile again where TVM's runtime libraries for the target can be downloaded",
        )
    part = lib / library
    interface = Interface.read(part)
    with tempfile.TemporaryDirectory(prefix="bitwright-run-") as work:
        folder = Path(work)
        own = part / LIBRARY_FILE  # a folder without a library describes a further function of the bundle's
        code = own if own.exists() else lib / LIBRARY_FILE
        if launch.library is not None and (code.parent / launch.library).exists():
            code = code.parent / launch.library
        command = [*launch.prefix, str(runner), str(code), str(folder), *launch.options]
        command += ["--function", interface.function] if interface.function != MAIN else []
        command += ["--repeat", str(repeat)] if repeat > 0 else []
        timed = trace and launch.executed == "native"
        command += ["--times", str(folder / "times")] if timed else []
        command += ["--trace", str(folder / "trace"), str(part / ROLES_FILE)] if trace else []
        command += _write_inputs(folder, interface.arrange(feeds))
        printed = run_tool(
            command, what="running the artifact", timeout_s=launch.timeout_s, environment=launch.environment
        )
        outputs = {p.name: np.load(folder / f"output_{k}.npy") for k, p in enumerate(interface.outputs)}
        calls = list(read_trace(folder / "trace")) if trace else []
        times = read_times(folder / "times") if timed else ()
    seconds = _best_seconds(printed) if launch.executed == "native" and repeat > 0 else None
    return Execution(
        outputs=outputs, trace=calls, executed=launch.executed, seconds=seconds, call_seconds=times
    )


def _write_inputs(folder: Path, arrays: Sequence[np.ndarray]) -> list[str]:
    paths = [folder / f"input_{k}.npy" for k in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array, allow_pickle=False)
    return [str(path) for path in paths]


def read_trace(path: Path) -> Iterator[tuple[str, tuple[np.ndarray, ...], np.ndarray]]:
    """Yield the kernel calls of a trace file: name, activation inputs, output.

    The format is, for each call, the line ``call NAME INPUTS`` and then INPUTS + 1 arrays in .npy format.

    Raises:
        ToolchainError: The file is cut short or is no trace.
    """
    with path.open("rb") as file:
        while line := file.readline():
            try:
                word, name, count = line.decode().split()
                if word != "call":
                    raise ValueError(line)
                arrays = [np.lib.format.read_array(file, allow_pickle=False) for _ in range(int(count) + 1)]
            except ValueError as error:
                msg = "the runner's trace is damaged"
                raise ToolchainError(msg, where=str(path)) from error
            yield name, tuple(arrays[:-1]), arrays[-1]


def read_times(path: Path) -> tuple[tuple[str, float], ...]:
    """Return (function, best seconds) of every call, in order, from the lines ``NAME MICROSECONDS``."""
    rows = (line.split() for line in path.read_text().splitlines())
    return tuple((name, float(microseconds) * 1e-6) for name, microseconds in rows)


def _best_seconds(printed: str) -> float:
    words = printed.split()
    return float(words[words.index("best_us") + 1]) * 1e-6
