"""From a circuit's files to what it takes: predicted, synthesized, placed and routed; tables for the report."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from bitwright.targets.backend import Measurement
from bitwright.targets.fpga.cells import Cells
from bitwright.targets.fpga.cost_model import predict, table_of
from bitwright.targets.fpga.folding import device_of
from bitwright.targets.fpga.network import Engine, Network
from bitwright.targets.fpga.place_route import Placed, place_and_route
from bitwright.targets.fpga.synthesis import Synthesis, Synthesizer
from bitwright.targets.generator import Cell, Request, Step, Table
from bitwright.targets.schema import Profile
from bitwright.targets.sections.fpga import FpgaDevice

KINDS = ("luts", "ffs", "dsps", "brams")
WORDS = {"luts": "LUTs", "ffs": "flip-flops", "dsps": "DSP blocks", "brams": "block RAMs"}
SYNTH, PLACE = "synth", "pnr"
STEPS = {
    SYNTH: "synthesize by yosys: cells of every engine",
    PLACE: "place and route by nextpnr: clock, bitstream (ECP5)",
}
BITSTREAM, NEXTPNR_REPORT = "design.bit", "report.json"


@dataclass(frozen=True)
class Design:
    """The files of a circuit.

    Attributes:
        folder: Where they are.
        files: Verilog files, relative to it.
        top: Top module.
        network: Module whose instances are the engines.
        constraints: Pins for place and route (LPF), relative to the folder, or None.
    """

    folder: Path
    files: tuple[str, ...]
    top: str
    network: str
    constraints: str | None = None


@dataclass(frozen=True)
class Implemented:
    """What was found out about a circuit's size and speed.

    Attributes:
        measurements: Figures.
        tables: Tables of the report.
        notes: What a reader should know.
        shipped: Files that were added to the folder, relative to it.
    """

    measurements: tuple[Measurement, ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()
    shipped: tuple[Path, ...] = ()


def implement(
    network: Network, design: Design, profile: Profile, request: Request, progress: Step
) -> Implemented:
    """Predict what a circuit takes and, as far as asked for, synthesize, place and route it.

    Args:
        network: The circuit.
        design: Its files.
        profile: Target.
        request: ``synth`` and ``pnr`` among its steps; limits of tools.
        progress: Told how far the work is.

    Raises:
        ProfileError: Place and route is asked for a device that has none.
        ToolchainError: A tool is missing, failed or took too long.
    """
    device = device_of(profile)
    table = table_of(device)
    predicted = {engine.name: predict(engine, table) for engine in network.engines}
    if not request.steps & {SYNTH, PLACE}:
        return Implemented(
            (_predicted_luts(predicted.values()),), (_resources(network, predicted, None, device),)
        )
    with tempfile.TemporaryDirectory(prefix="bitwright-") as work:
        netlist = Path(work, "netlist.json")
        found = _synthesizer(device, request).circuit(
            design.folder, design.files, design.top, netlist, split=design.network, progress=progress
        )
        figures = [_synthesized(found, device)]
        tables = [_resources(network, predicted, found, device)]
        if PLACE not in request.steps:
            return Implemented(tuple(figures), tuple(tables))
        progress(0, 1, "place and route")
        placed = _placed(netlist, design, profile, request, Path(work))
        for name in (BITSTREAM, NEXTPNR_REPORT):
            (design.folder / name).write_bytes(Path(work, name).read_bytes())
    figures += _speed(placed, network, profile)
    tables.append(_used(placed))
    return Implemented(tuple(figures), tuple(tables), (), (Path(BITSTREAM), Path(NEXTPNR_REPORT)))


def _synthesizer(device: FpgaDevice, request: Request) -> Synthesizer:
    return Synthesizer(device.series, request.timeout_s, request.cache)


def _placed(netlist: Path, design: Design, profile: Profile, request: Request, work: Path) -> Placed:
    constraints = None if design.constraints is None else design.folder / design.constraints
    return place_and_route(
        netlist,
        device_of(profile),
        work,
        clock_hz=profile.clock_hz,
        constraints=constraints,
        timeout_s=request.timeout_s,
    )


def _sum(cells: Iterable[Cells]) -> Cells:
    return reduce(Cells.__add__, cells, Cells())


def _predicted_luts(cells: Iterable[Cells]) -> Measurement:
    total = _sum(cells)
    detail = f"{total.dsps:.0f} DSP blocks, {total.brams:.0f} block RAMs, {total.ffs:.0f} flip-flops"
    return Measurement("predicted size", f"{total.luts:.0f} LUTs", detail)


def _synthesized(found: Synthesis, device: FpgaDevice) -> Measurement:
    cells = found.cells
    shares = ", ".join(
        f"{WORDS[kind]} {getattr(cells, kind):.0f} of {getattr(device, kind)}" for kind in KINDS[1:]
    )
    known = f"; {found.reused} of {found.modules} modules known from earlier runs"
    return Measurement("synthesized size", f"{cells.luts:.0f} of {device.luts} LUTs", shares + known)


def _speed(placed: Placed, network: Network, profile: Profile) -> list[Measurement]:
    clock = f"nextpnr's timing model; {profile.clock_hz / 1e6:g} MHz were aimed for"
    frames = placed.fmax_hz / network.interval
    return [
        Measurement("highest clock", f"{placed.fmax_hz / 1e6:.1f} MHz", clock),
        Measurement(
            "frame rate", f"{frames:.1f} frames/s", f"a frame every {network.interval} cycles at that clock"
        ),
    ]


def _used(placed: Placed) -> Table:
    rows = tuple(
        (word, used, there, f"{used / max(there, 1):.1%}") for word, (used, there) in placed.used.items()
    )
    return Table(
        "Placed and routed", ("Cells", "#Used", "#There are", "Share"), rows, "As nextpnr counts them."
    )


def _resources(
    network: Network, predicted: dict[str, Cells], found: Synthesis | None, device: FpgaDevice
) -> Table:
    """Return the table of engines: what each was predicted to take, and what yosys made of it."""
    heads = tuple(f"#{WORDS[kind]}" for kind in KINDS)
    columns = ("Engine", "Module", *heads)
    if found is not None:
        columns += tuple(f"#{WORDS[kind]} (yosys)" for kind in KINDS)
    rows = [
        _row(e, predicted[e.name], None if found is None else found.instances.get(e.name), found)
        for e in network.engines
    ]
    total = _sum(predicted.values())
    last: list[Cell] = ["all", "", *_counts(total)]
    if found is not None:
        last += _counts(found.cells)
        note = ", ".join(
            f"{WORDS[kind]} {_off(getattr(total, kind), getattr(found.cells, kind))}" for kind in KINDS
        )
        note = f"Predicted against synthesized, all together: {note}."
    else:
        note = "Predicted from the cost table; --synth counts them."
    limits: list[Cell] = ["device", device.part, *(int(getattr(device, kind)) for kind in KINDS)]
    limits += [None] * (len(columns) - len(limits))
    return Table("Resources", columns, (*rows, tuple(last), tuple(limits)), note)


def _row(engine: Engine, predicted: Cells, cells: Cells | None, found: Synthesis | None) -> tuple[Cell, ...]:
    row: list[Cell] = [engine.name, engine.module, *_counts(predicted)]
    if found is not None:
        row += [None] * len(KINDS) if cells is None else _counts(cells)
    return tuple(row)


def _counts(cells: Cells) -> list[Cell]:
    return [round(getattr(cells, kind)) for kind in KINDS]


def _off(predicted: float, counted: float) -> str:
    return f"{predicted / counted - 1:+.1%}" if counted else "none"
