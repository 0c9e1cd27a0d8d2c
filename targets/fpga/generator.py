"""The generator of this family: Verilog of a streaming network, simulated bit for bit against its integer reference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import UsageError
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.interpret.run import run_step
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import FloatIsland
from bitwright.targets.backend import Measurement
from bitwright.targets.fpga.assemble import assemble
from bitwright.targets.fpga.circuit import (
    AXIS_FILE,
    NETWORK_FILE,
    from_frame,
    recorded,
    to_frame,
    write_circuit,
)
from bitwright.targets.fpga.engines.requantization import multiplier_bits
from bitwright.targets.fpga.folding import as_folding, as_values, device_of
from bitwright.targets.fpga.host import Host
from bitwright.targets.fpga.implementation import STEPS, SYNTH, Design, implement
from bitwright.targets.fpga.network import Engine, Network
from bitwright.targets.fpga.place_route import place_and_route_missing
from bitwright.targets.fpga.recognise import recognise
from bitwright.targets.fpga.simulation import Trace, build_simulator, simulate
from bitwright.targets.fpga.testbench import (
    BOARD_CONSTRAINTS,
    BOARD_FILE,
    BOARD_TOP,
    bench_files,
    board_files,
)
from bitwright.targets.fpga.verilog import NETWORK, RTL_FILES, TOP, layer_inputs
from bitwright.targets.generator import Check, Generated, Request, Simulation, Step, Table
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.circuit_simulator import simulator_missing

FOLDINGS_FILE = "foldings.json"
STATIC_MODEL = "model.static.onnx"
EXECUTED = "simulated (cxxrtl)"
# Frames in a row that show the interval between them: the pipeline is full from the second on.
FRAMES = 3


class Fpga:
    """Dataflow circuits for FPGAs."""

    family = "fpga"
    steps: Mapping[str, str] = STEPS

    def missing_tools(self, profile: Profile, request: Request) -> str | None:
        """Return what to install before anything can be generated, or None: only optional steps need tools.

        Raises:
            ProfileError: There is no open place and route for the device.
        """
        missing = simulator_missing() if SYNTH in request.steps else None
        if "pnr" in request.steps:
            missing = place_and_route_missing(device_of(profile)) or simulator_missing()
        return missing

    def generate(
        self, model: ir.Model, profile: Profile, folder: Path, request: Request, progress: Step
    ) -> Generated:
        """Write the circuit, its test bench and, if asked for, what synthesis, place and route make of it.

        Raises:
            PerformanceGateError: A step inside the network has no circuit.
            ProfileError: A folding is illegal.
            ToolchainError: A tool failed.
        """
        progress(0, 3, "circuit")
        host = host_of(model, profile)
        foldings = {name: as_folding(values) for name, values in request.foldings.items()}
        network = assemble(host.circuit, host.program, foldings)
        shipped = list(write_circuit(network, folder, f"Streaming network for {profile.name}"))
        record = {name: as_values(folding) for name, folding in network.foldings.items()}
        (folder / FOLDINGS_FILE).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        progress(1, 3, "test bench")
        shipped += _write_texts(folder, bench_files(network, host) | _board(network, profile))
        progress(2, 3, "resources")
        found = implement(network, _design(folder, profile), profile, request, progress)
        return Generated(
            notes=(*_notes(network), *found.notes),
            measurements=(*_predicted(network, profile), *found.measurements),
            tables=(engine_table(network), interface_table(network), *found.tables),
            shipped=(*shipped, *found.shipped),
            not_generated=dict(on_host(host)),
            seconds=network.interval / profile.clock_hz,
        )

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why the circuit cannot be simulated here, or None."""
        del profile
        missing = simulator_missing()
        return f"the simulator is not installed: {missing}" if missing else None

    def execute(
        self, folder: Path, feeds: Mapping[str, np.ndarray], profile: Profile, *, check: bool
    ) -> Simulation:
        """Simulate the circuit on one frame; with ``check`` on several equal ones, every layer compared."""
        host, network, program = _built(folder, profile)
        source = host.send(feeds)
        frame = to_frame(host.program, host.circuit.source, source)
        trace = simulate(program, network, np.stack([frame] * (FRAMES if check else 1)))
        result = from_frame(host.program, host.circuit.result, trace.outputs[0])
        outputs = host.receive(result, feeds)
        if not check:
            return Simulation(outputs, EXECUTED)
        checks = tuple(compare_layers(host, network, trace))
        return Simulation(
            outputs, EXECUTED, checks, (*measured(network, trace, profile), *differences(host, source))
        )


GENERATOR = Fpga()


def host_of(model: ir.Model, profile: Profile) -> Host:
    """Return the program of a model around its circuit; errors as :func:`recognise`."""
    program = extract_program(model)
    return Host(program, recognise(program, profile), multiplier_bits(profile))


def read_circuit(folder: Path, profile: Profile) -> tuple[Host, Network]:
    """Return what a folder's circuit was generated from.

    Raises:
        UsageError: The folder holds no circuit.
    """
    try:
        record = json.loads((folder / FOLDINGS_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        what = f"no circuit can be read: {error}"
        raise UsageError(what, where=str(folder)) from error
    host = host_of(read_model(folder / STATIC_MODEL).model, profile)
    foldings = {name: as_folding(values) for name, values in record.items()}
    return host, assemble(host.circuit, host.program, foldings)


@lru_cache(maxsize=4)
def _read(folder: Path, profile: str, written: int) -> tuple[Host, Network, Path]:
    """Read a folder once for many samples; ``written`` is when its network was."""
    del written
    host, network = read_circuit(folder, Profile.model_validate_json(profile))
    return host, network, build_simulator(folder, network)


def _built(folder: Path, profile: Profile) -> tuple[Host, Network, Path]:
    written = (folder / NETWORK_FILE).stat().st_mtime_ns
    return _read(folder.resolve(), profile.model_dump_json(by_alias=True), written)


def _write_texts(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return [Path(name) for name in texts]


def _board(network: Network, profile: Profile) -> dict[str, str]:
    return board_files(network) if device_of(profile).series == "ecp5" else {}


def _design(folder: Path, profile: Profile) -> Design:
    modules = tuple(f"rtl/{name}" for name in RTL_FILES)
    files = (*modules, NETWORK_FILE, AXIS_FILE)
    if device_of(profile).series != "ecp5":
        return Design(folder, files, TOP, NETWORK)
    return Design(folder, (*files, BOARD_FILE), BOARD_TOP, NETWORK, BOARD_CONSTRAINTS)


def _notes(network: Network) -> Iterator[str]:
    slowest = network.bottleneck
    yield f"{len(network.engines)} engines for {len(network.layers)} layers, a frame every {network.interval} cycles"
    yield f"the slowest engine is {slowest.name} ({slowest.node})"


def on_host(host: Host) -> Iterator[tuple[str, str]]:
    """Yield the nodes that the host computes, and why."""
    for step in (*host.circuit.before, *host.circuit.after):
        side = "before" if step in host.circuit.before else "behind"
        why = "floating point" if isinstance(step, FloatIsland) else "conversion between float and integer"
        for node in step.nodes or (step.name,):
            yield node, f"{why} {side} the circuit, on the host"


def _predicted(network: Network, profile: Profile) -> tuple[Measurement, ...]:
    rate = profile.clock_hz / network.interval
    detail = f"{rate:.1f} frames/s at {profile.clock_hz / 1e6:g} MHz; engine {network.bottleneck.name}"
    return (Measurement("predicted frame interval", f"{network.interval} cycles", detail),)


def measured(network: Network, trace: Trace, profile: Profile) -> tuple[Measurement, ...]:
    """Return the cycles that a simulation took, beside the closed form."""
    off = trace.interval / network.interval - 1
    micro = trace.latency / profile.clock_hz * 1e6
    return (
        Measurement(
            "simulated frame interval", f"{trace.interval:g} cycles", f"{off:+.2%} of the closed form"
        ),
        Measurement(
            "simulated latency", f"{trace.latency} cycles", f"{micro:.1f} us, first element in to last out"
        ),
    )


def compare_layers(host: Host, network: Network, trace: Trace, frame: int = 0) -> Iterator[Check]:
    """Yield every layer's recorded result and what the reference makes of its recorded operands."""
    steps = {step.output: step for step in host.inside()}
    for engine in network.engines:
        if engine.step is None:
            continue
        out = network.streams[engine.outputs[0]]
        step = steps[out.tensor]
        operands = [
            recorded(host.program, host.circuit.aliases, name, trace.streams[stream][frame])
            for name, stream in zip(step.inputs, layer_inputs(network, engine), strict=True)
        ]
        actual = from_frame(host.program, out.tensor, trace.streams[out.name][frame])
        yield Check(engine.node, engine.name, actual, host.expected(step, operands))


def differences(host: Host, source: np.ndarray) -> tuple[Measurement, ...]:
    """Count where fixed-point requantization rounds otherwise than the Q/DQ model's float scales."""
    program = host.program
    values = {**program.constants, host.circuit.source: source}
    for step in host.inside():
        inputs = tuple(values[name] for name in step.inputs)
        values[step.output] = run_step(step, program, inputs)[0]
    elements = off = largest = 0
    reference = host.reference(source)
    for step in host.inside():
        if program.tensor(step.output).quant is None:
            continue
        apart = np.abs(reference[step.output].astype(np.int64) - values[step.output].astype(np.int64))
        elements, off, largest = (
            elements + apart.size,
            off + int((apart > 0).sum()),
            max(largest, int(apart.max())),
        )
    share = f"{off / max(elements, 1):.3%} of {elements} integers of all layers, by at most {largest}"
    return (Measurement("rounded otherwise than the Q/DQ model", str(off), share),)


def engine_table(network: Network) -> Table:
    """Return one row an engine."""
    layers = {layer.name: layer for layer in network.layers}
    rows = []
    for engine in network.engines:
        layer = layers.get(engine.step or "")
        folding = network.foldings[layer.name] if layer else None
        rows.append(
            (
                engine.name,
                engine.node,
                engine.module,
                folding.pe if folding else None,
                folding.simd if folding and layer and layer.macs else None,
                _multipliers(engine) if layer and layer.macs else "",
                str(layer.code) if layer and layer.code else "",
                engine.cycles,
                f"{engine.cycles / network.interval:.1%}",
            )
        )
    columns = (
        "Engine",
        "Node",
        "Module",
        "#PE",
        "#SIMD",
        "Products in",
        "Weight bits",
        "#Cycles a frame",
        "Busy",
    )
    note = "Cycles are exact where neighbours never let an engine wait; the largest is the interval between frames."
    return Table("Engines", columns, tuple(rows), note)


def _multipliers(engine: Engine) -> str:
    return "DSP" if engine.parameters.get("DSP") else "LUT"


def interface_table(network: Network) -> Table:
    """Return what the host sends and receives."""
    rows = tuple(
        (port, s.tensor, s.positions, s.channels, s.bits, s.lanes, s.beats)
        for port, s in (
            ("s_axis", network.streams[network.input]),
            ("m_axis", network.streams[network.output]),
        )
    )
    columns = ("Port", "Tensor", "#Pixels", "#Channels", "#Bits", "#Side by side", "#Transfers")
    return Table("Streams", columns, rows, "Signed integers, channels last; the first in the lowest bits.")


def reference_outputs(host: Host, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the model's outputs as the circuit and its host compute them, by the integer reference."""
    source = host.send(feeds)
    return host.receive(host.reference(source)[host.circuit.result], feeds)
