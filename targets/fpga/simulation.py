"""Simulation of a circuit: yosys translates it to C++ (cxxrtl), a C++ compiler makes a program of that.

A program is kept by what it was made from, so a bundle is translated once however often it is executed.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from bitwright.targets.fpga.network import Network, Stream
from bitwright.targets.fpga.verilog import NETWORK, RTL_FILES, TAPS, tapped_streams
from bitwright.targets.fpga.yosys import run_yosys, yosys_version
from bitwright.targets.toolchain.cache import cache_place
from bitwright.targets.toolchain.circuit_simulator import machine_triple
from bitwright.targets.toolchain.linker import find_driver
from bitwright.targets.toolchain.process import run_tool
from bitwright.targets.toolchain.yosys import simulator_headers

NETWORK_FILE = "network.v"
HARNESS = "simulate.cc"
# Streams that are silent for so many cycles more than any engine takes will never go on.
PATIENCE = 100_000
EDITION = 3
REPEATED = ("multiply", "adder_tree", "requantize", "drain", "matrix_vector", "depthwise", "sliding_window")


@dataclass(frozen=True)
class Trace:
    """What a simulation recorded.

    Attributes:
        outputs: Elements of the result [frames, elements], int8 or int32.
        streams: Inner stream -> elements [frames, elements].
        cycles: Cycles until the last transfer.
        ends: Cycle of the last transfer of every frame, counted from the first transfer in.
    """

    outputs: np.ndarray
    streams: Mapping[str, np.ndarray]
    cycles: int
    ends: tuple[int, ...]

    @property
    def latency(self) -> int:
        """Cycles from the first transfer in to the last transfer of the first frame."""
        return self.ends[0] + 1

    @property
    def interval(self) -> float:
        """Cycles between frames, once the pipeline is full; the latency if there is one frame."""
        half = (len(self.ends) - 1) // 2
        if len(self.ends) == 1:
            return float(self.latency)
        return (self.ends[-1] - self.ends[half]) / (len(self.ends) - 1 - half)


def build_simulator(
    folder: Path,
    network: Network,
    *,
    top: str = NETWORK,
    files: Sequence[str] = (),
    timeout_s: float = 1800.0,
) -> Path:
    """Return a program that simulates the circuit in a folder; made unless it is known already.

    Args:
        folder: Holds ``network.v``, the module files and the memories.
        network: The network it was written from.
        top: A module around the network that has its ports, to simulate that instead; inner streams are then unseen.
        files: Further Verilog files that it needs, relative to the folder.
        timeout_s: Longest time of each tool.

    Raises:
        ToolchainError: A tool is missing or failed.
    """
    taps = len(tapped_streams(network)) if top == NETWORK else 0
    place = cache_place("simulators", _key(folder, f"{top} {taps}"))
    program = place / "simulate"
    if program.exists():
        return program
    with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
        made = _build(folder, top, files, taps, Path(work), timeout_s)
        place.mkdir(parents=True, exist_ok=True)
        staged = place / f"{program.name}.{Path(work).name}"
        shutil.copy2(made, staged)
        staged.replace(program)
    return program


def _key(folder: Path, what: str) -> str:
    """Return a hash of everything that a simulator is made from."""
    digest = hashlib.sha256(f"{EDITION} {yosys_version()} {what}".encode())
    digest.update(_harness().encode())
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".v", ".hex")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:32]


def _harness() -> str:
    return files("bitwright.targets.fpga").joinpath("rtl", HARNESS).read_text("utf-8")


def _build(folder: Path, top: str, files: Sequence[str], taps: int, work: Path, timeout_s: float) -> Path:
    sources = " ".join((*(f"rtl/{name}" for name in RTL_FILES), NETWORK_FILE, *files))
    script = [
        f"read_verilog {f'-D {TAPS}' if taps else ''} {sources}",
        f"hierarchy -check -top {top}",
        # One class for what occurs many times: flattened, sixty-four multipliers took the compiler a minute.
        "setattr -mod -set keep_hierarchy 1 " + " ".join(f"A:hdlname=\\{name}" for name in REPEATED),
        "proc",
        "flatten",
        "opt_clean",
        "splitnets -driver",  # wide nets would be copied as a whole for every cell that drives a part of them
        f"write_cxxrtl -g0 {work}/network.cc",
    ]
    run_yosys(script, what="translating the circuit for simulation", timeout_s=timeout_s, folder=folder)
    (work / HARNESS).write_text(_harness())
    recording = " ".join(f"record(taps[{k}], top.p_tap__{k});" for k in range(taps))
    driver = find_driver(machine_triple(), "c++")
    program = work / "simulate"
    command = [
        *driver.command,
        "-std=c++17",
        "-O1",
        "-fno-strict-aliasing",
        "-DNDEBUG",
        f"-DTAP_COUNT={taps}",
        f"-DTOP=p_{top.replace('_', '__')}",
        f"-DRECORD_TAPS={recording}",
        f"-I{simulator_headers()}",
        str(work / HARNESS),
        "-o",
        str(program),
    ]
    run_tool(command, what="compiling the simulator", timeout_s=timeout_s)
    return program


def simulate(
    program: Path, network: Network, frames: np.ndarray, *, stalls: int = 0, timeout_s: float = 1800.0
) -> Trace:
    """Simulate a circuit.

    Args:
        program: From :func:`build_simulator`.
        network: The network.
        frames: Signed integers [frames, elements] in the order of the input stream.
        stalls: Not 0: both ends of the circuit wait at random, seeded by this.
        timeout_s: Longest time.

    Raises:
        ToolchainError: The circuit got stuck, or the program failed.
    """
    source, result = network.streams[network.input], network.streams[network.output]
    taps = tapped_streams(network)
    with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
        given = Path(work, "in.bin")
        given.write_bytes(np.ascontiguousarray(frames, np.int8).tobytes())
        counts = (len(frames), source.beats, result.beats, 4 * network.interval + PATIENCE, stalls)
        run_tool(
            (str(program), str(given), work, *map(str, counts)),
            what="simulating the circuit",
            timeout_s=timeout_s,
        )
        words = [int(word) for word in Path(work, "cycles.txt").read_text().split()]
        recorded = ((tap, Path(work, f"tap_{k}.bin")) for k, tap in enumerate(taps))
        streams = {tap.name: _elements(path, tap, len(frames)) for tap, path in recorded if path.exists()}
        outputs = _elements(Path(work, "out.bin"), result, len(frames))
    total, start, *ends = words
    return Trace(outputs, streams, total, tuple(end - start for end in ends))


def _elements(path: Path, stream: Stream, frames: int) -> np.ndarray:
    """Return whole frames of a recorded stream."""
    values = np.frombuffer(path.read_bytes(), f"<i{stream.bits // 8}")
    return values[: frames * stream.elements].reshape(frames, stream.elements)
