"""From the files of an artifact to programs: the network around the cycle model, and around the simulated circuit."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from bitwright.targets.npu.machine import Machine, size_header, top_module
from bitwright.targets.toolchain.cache import cache_place
from bitwright.targets.toolchain.circuit_simulator import machine_triple
from bitwright.targets.toolchain.linker import find_driver
from bitwright.targets.toolchain.process import run_tool
from bitwright.targets.toolchain.yosys import run_yosys, simulator_headers, yosys_version

MODEL_PROGRAM, CIRCUIT_PROGRAM = "run_model", "run_circuit"
CIRCUIT_FILES = ("npu_array.v", "npu_requantize.v", "npu.v")
TOP_FILE, SIZE_FILE = "npu_top.v", "npu_size.h"
BOARD_FILES = ("npu.h", "npu_driver.c", "npu_model.c", "npu_main.c")
SIMULATION_FILE, SIMULATED_FILE = "npu_rtl.cc", "npu_simulated.cc"
TIMEOUT_S = 1800.0


def shipped_text(name: str) -> str:
    """Return the text of one of the circuit's or the host's files."""
    folder = "board" if name in BOARD_FILES else "rtl"
    return files("bitwright.targets.npu").joinpath(folder, name).read_text("utf-8")


def write_sources(machine: Machine, folder: Path) -> tuple[str, ...]:
    """Write the circuit, its top level, the driver, the cycle model and the simulation's driver; return their names."""
    names = (*CIRCUIT_FILES, *BOARD_FILES, SIMULATION_FILE)
    for name in names:
        (folder / name).write_text(shipped_text(name))
    (folder / TOP_FILE).write_text(top_module(machine))
    (folder / SIZE_FILE).write_text(size_header(machine))
    return (*names, TOP_FILE, SIZE_FILE)


def circuit_object(machine: Machine, *, timeout_s: float = TIMEOUT_S) -> Path:
    """Return the simulated circuit as an object file; made unless it is known already.

    Raises:
        ToolchainError: A tool is missing or failed.
    """
    place = cache_place("npu", _key(machine))
    kept = place / "circuit.o"
    if kept.exists():
        return kept
    with tempfile.TemporaryDirectory(prefix="bitwright-npu-") as work:
        made = _compile_circuit(machine, Path(work), timeout_s)
        place.mkdir(parents=True, exist_ok=True)
        staged = place / f"{kept.name}.{Path(work).name}"
        shutil.copy2(made, staged)
        staged.replace(kept)
    return kept


def _key(machine: Machine) -> str:
    """Return a hash of everything that the object is made from."""
    parts = [
        yosys_version(),
        find_driver(machine_triple(), "c++").version(),
        size_header(machine),
        top_module(machine),
    ]
    parts += [shipped_text(name) for name in (*CIRCUIT_FILES, SIMULATION_FILE, "npu.h")]
    parts += [*_simulation_script(Path()), *_SIMULATION_FLAGS]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


_SIMULATION_FLAGS = ("-std=c++17", "-O1", "-fno-strict-aliasing", "-DNDEBUG", "-fPIC")


def _simulation_script(work: Path) -> list[str]:
    return [
        f"read_verilog {' '.join((*CIRCUIT_FILES, TOP_FILE))}",
        "hierarchy -check -top npu_top",
        "proc",
        "flatten",
        "splitnets -driver",  # wide nets would be copied as a whole for every cell: it simulates 70 times as fast
        "opt_clean",
        f"write_cxxrtl -g0 {work / SIMULATED_FILE}",
    ]


def _compile_circuit(machine: Machine, work: Path, timeout_s: float) -> Path:
    write_sources(machine, work)
    what = "translating the circuit for simulation"
    run_yosys(_simulation_script(work), what=what, timeout_s=timeout_s, folder=work)
    driver = find_driver(machine_triple(), "c++")
    target = work / "circuit.o"
    includes = [f"-I{work}", f"-I{simulator_headers()}"]
    command = [
        *driver.command,
        *_SIMULATION_FLAGS,
        *includes,
        "-c",
        str(work / SIMULATION_FILE),
        "-o",
        str(target),
    ]
    run_tool(command, what="compiling the simulated circuit", timeout_s=timeout_s)
    return target


def build_programs(
    machine: Machine, folder: Path, *, circuit: bool = True, timeout_s: float = TIMEOUT_S
) -> None:
    """Build the programs of an artifact inside its folder.

    Args:
        machine: The accelerator.
        folder: Holds the network's files and what :func:`write_sources` wrote; receives the programs.
        circuit: Build the program around the simulated circuit, too.
        timeout_s: Longest time of one tool.

    Raises:
        ToolchainError: A compiler is missing or failed.
    """
    with tempfile.TemporaryDirectory(prefix="bitwright-npu-") as work:
        place = Path(work)
        common = [
            _compile(source, place, folder, timeout_s)
            for source in sorted(folder.glob("*.c"))
            if source.name != "npu_model.c"
        ]
        common += sorted(folder.glob("*.o"))
        model = _compile(folder / "npu_model.c", place, folder, timeout_s)
        _link([*common, model], folder / MODEL_PROGRAM, timeout_s)
        if circuit:
            _link(
                [*common, circuit_object(machine, timeout_s=timeout_s)], folder / CIRCUIT_PROGRAM, timeout_s
            )


def _compile(source: Path, work: Path, include: Path, timeout_s: float) -> Path:
    target = work / f"{source.stem}.compiled.o"
    driver = find_driver(machine_triple())
    flags = ["-std=gnu11", "-O2", "-DNET_TRACE", f"-I{include}", "-c", str(source), "-o", str(target)]
    run_tool([*driver.command, *flags], what=f"compiling {source.name}", timeout_s=timeout_s)
    return target


def _link(objects: Sequence[Path], program: Path, timeout_s: float) -> None:
    driver = find_driver(machine_triple(), "c++")
    command = [*driver.command, "-no-pie", *map(str, objects), "-lm", "-o", str(program)]
    run_tool(command, what=f"linking {program.name}", timeout_s=timeout_s)
