"""The generator of this family: an int8 TFLite file, Vela's command stream, firmware sources."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import InfeasibleBudgetError, PerformanceGateError
from bitwright.targets.backend import Measurement
from bitwright.targets.ethos_u.execution import (
    accepted,
    compare_layers,
    host_inputs,
    host_outputs,
    translated,
)
from bitwright.targets.ethos_u.firmware import write_firmware
from bitwright.targets.ethos_u.litert import ReferenceSession
from bitwright.targets.ethos_u.tables import (
    HONEST,
    io_table,
    layer_table,
    measurements,
    nodes_of,
    weight_table,
)
from bitwright.targets.ethos_u.tflite_file import tflite_bytes
from bitwright.targets.ethos_u.translate import translate
from bitwright.targets.ethos_u.vela import SRAM, VelaReport, run_vela
from bitwright.targets.generator import Generated, LayerPrice, Price, Request, Simulation, Step
from bitwright.targets.schema import Profile
from bitwright.targets.sections.vela import Vela

TFLITE_FILE, OPTIMISED_FILE = "model.tflite", "model_vela.tflite"
STATIC_MODEL = "model.static.onnx"
PACKAGES = {"ethosu": "Vela", "ai_edge_litert": "LiteRT", "flatbuffers": "flatbuffers"}
DESCRIPTION = "written by bitwright"
EXECUTED = "TFLite reference kernels"


class EthosU:
    """Arm's Ethos-U accelerators."""

    family = "ethos_u"
    steps: Mapping[str, str] = {}

    def missing_tools(self, profile: Profile, request: Request) -> str | None:
        """Return what to install before anything can be generated, or None."""
        del profile, request
        missing = [name for package, name in PACKAGES.items() if find_spec(package) is None]
        return f"pip install 'bitwright[ethos-u]' (missing: {', '.join(missing)})" if missing else None

    def generate(
        self, model: ir.Model, profile: Profile, folder: Path, request: Request, progress: Step
    ) -> Generated:
        """Write the TFLite file, have Vela compile it, write it as a C array.

        Raises:
            PerformanceGateError: An operator would run on the processor.
            InfeasibleBudgetError: It needs more memory than the device has.
            ToolchainError: Vela failed.
        """
        progress(0, 3, "translating")
        translation = translate(model)
        graph = accepted(translation)
        (folder / TFLITE_FILE).write_bytes(tflite_bytes(graph, DESCRIPTION))
        progress(1, 3, "vela")
        report = compile_file(folder / TFLITE_FILE, vela_of(profile), folder, request.timeout_s)
        nodes = nodes_of(translation)
        on_cpu = {nodes.get(layer.tensor, layer.tensor): layer.operator for layer in report.on_cpu}
        check_coverage(on_cpu, vela_of(profile))
        check_memory(report, profile)
        progress(2, 3, "firmware")
        sources = write_firmware(
            folder, graph, report.optimised.read_bytes(), profile.name, report.memory_bytes["sram"]
        )
        return Generated(
            notes=(HONEST, f"{len(graph.layers)} operators in the TFLite file"),
            measurements=measurements(report, profile),
            tables=(layer_table(report, nodes), weight_table(translation), io_table(graph)),
            shipped=(Path(OPTIMISED_FILE), *sources),
            not_generated={
                node: f"{operator} has no form on the accelerator" for node, operator in on_cpu.items()
            },
            seconds=report.seconds,
        )

    def price(self, model: ir.Model, profile: Profile, request: Request) -> Price:
        """Return Vela's estimate of every layer; the bytes of a weight are those of its transfers.

        Raises:
            PerformanceGateError: An operator would run on the processor.
            ToolchainError: Vela failed.
        """
        translation = translate(model)
        graph = accepted(translation)
        with tempfile.TemporaryDirectory(prefix="bitwright-vela-") as name:
            path = Path(name) / TFLITE_FILE
            path.write_bytes(tflite_bytes(graph, DESCRIPTION))
            report = run_vela(path, vela_of(profile), Path(name), request.timeout_s)
        return Price(report.seconds, layer_prices(report, nodes_of(translation), profile))

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return why the artifact cannot be executed here: only without the reference kernels."""
        del profile
        if find_spec("ai_edge_litert") is None:
            return (
                "LiteRT, which has the reference kernels, is not installed: pip install 'bitwright[ethos-u]'"
            )
        return None

    def execute(
        self, folder: Path, feeds: Mapping[str, np.ndarray], profile: Profile, *, check: bool
    ) -> Simulation:
        """Execute ``model.tflite`` by the reference kernels, with ``check`` every layer against its integer model."""
        translation = translated(folder / STATIC_MODEL)
        given = host_inputs(translation, feeds)
        found = ReferenceSession(folder / TFLITE_FILE, everything=check).run(given)
        outputs = host_outputs(translation, found)
        checks = (
            tuple(compare_layers(translation, found | given, profile.numerics.requantize)) if check else ()
        )
        equal = sum(np.array_equal(c.actual, c.expected) for c in checks)
        note = Measurement("Layers equal to their integer model", f"{equal} of {len(checks)}", HONEST)
        return Simulation(outputs, EXECUTED, checks, (note,) if check else ())


GENERATOR = EthosU()


def layer_prices(report: VelaReport, nodes: Mapping[str, str], profile: Profile) -> dict[str, LayerPrice]:
    """Return seconds and bytes of every ONNX node, at the profile's clock and the bandwidth of its far memory."""
    found: dict[str, LayerPrice] = {}
    for layer in report.layers:
        node = nodes.get(layer.tensor, layer.tensor)
        known = found.get(node, LayerPrice(0.0, 0.0))
        outside = sum(cycles for memory, cycles in layer.memory_cycles.items() if memory != SRAM)
        moved = outside / profile.clock_hz * profile.memory[-1].bytes_per_s
        found[node] = LayerPrice(known.seconds + layer.cycles / profile.clock_hz, known.weight_bytes + moved)
    return found


def vela_of(profile: Profile) -> Vela:
    """Return the profile's section; its checks demand one of this family."""
    assert profile.vela is not None
    return profile.vela


def compile_file(path: Path, options: Vela, folder: Path, timeout_s: float) -> VelaReport:
    """Have Vela compile a file; only the optimised file is kept, in ``folder``."""
    with tempfile.TemporaryDirectory(prefix="bitwright-vela-") as name:
        report = run_vela(path.resolve(), options, Path(name), timeout_s)
        kept = folder / OPTIMISED_FILE
        shutil.move(report.optimised, kept)
    return VelaReport(
        kept,
        report.layers,
        report.cycles,
        report.seconds,
        report.memory_bytes,
        report.weights,
        report.encoded_bytes,
    )


def check_coverage(on_cpu: Mapping[str, str], options: Vela) -> None:
    """Refuse operators that Vela left to the processor: it succeeds with nothing accelerated, too.

    Raises:
        PerformanceGateError: There are some, and the profile does not allow them.
    """
    if not on_cpu or options.cpu_operators == "allowed":
        return
    named = ", ".join(f"'{node}' ({operator})" for node, operator in on_cpu.items())
    what = f"Vela leaves {len(on_cpu)} operators to the processor: {named}"
    fix = "replace them, or write 'vela: {cpu_operators: allowed}' in a profile of your own"
    raise PerformanceGateError(what, where="Vela", fix=fix)


def check_memory(report: VelaReport, profile: Profile) -> None:
    """Refuse a file that needs more memory than the device has.

    Raises:
        InfeasibleBudgetError: It does.
    """
    sram = report.memory_bytes["sram"]
    constants = sum(report.memory_bytes.values()) - sram
    for used, limit, name in (
        (sram, profile.limits.ram_bytes, "SRAM"),
        (constants, profile.limits.flash_bytes, "flash or DRAM"),
    ):
        if limit is not None and used > limit:
            what = f"the model needs {used / 1024:.0f} KiB of {name}, the device has {limit / 1024:.0f} KiB"
            fix = "use fewer bits a weight or a smaller input, or 'vela: {optimise: Size}' in a profile of your own"
            raise InfeasibleBudgetError(what, where=profile.name, fix=fix)
