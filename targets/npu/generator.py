"""The generator of this family: a circuit, the host's network in C around it, and the proof of both in simulation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import InternalError, ModelError
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import Dot, FloatIsland, Program, WeightOnlyDot
from bitwright.targets.backend import Measurement
from bitwright.targets.generator import Check, Generated, Generator, Request, Simulation, Step
from bitwright.targets.npu.area import synthesized_area
from bitwright.targets.npu.execution import CYCLES_FILE, ON_ARRAY, Run, read_cycles, run_program
from bitwright.targets.npu.machine import Machine, machine_of
from bitwright.targets.npu.problem import problem_of
from bitwright.targets.npu.programs import (
    CIRCUIT_PROGRAM,
    MODEL_PROGRAM,
    build_programs,
    circuit_object,
    write_sources,
)
from bitwright.targets.npu.reference import reference_step
from bitwright.targets.npu.search import Tuned, tune
from bitwright.targets.npu.tables import (
    LayerPlan,
    area_measurement,
    layer_table,
    measurements,
    schedule_table,
)
from bitwright.targets.npu.tiling import Grid, grid_of
from bitwright.targets.schema import Profile
from bitwright.targets.toolchain.circuit_simulator import simulator_missing
from bitwright.targets.toolchain.interface import Interface, Port

LOWERING = "bitwright.targets.npu.lowering"  # by name: it imports tvm, which takes seconds
STATIC_MODEL = "model.static.onnx"
EXECUTED = "simulated (cxxrtl)"
SYNTHESIS = "synth"


class Npu:
    """Systolic accelerators described by a profile."""

    family = "npu"
    steps: Mapping[str, str] = {
        SYNTHESIS: "synthesize the array, with the profile's cell library if it names one"
    }

    def missing_tools(self, profile: Profile, request: Request) -> str | None:
        """Return what to install before anything can be generated, or None.

        Raises:
            ProfileError: The profile's array contradicts itself.
        """
        del request
        machine_of(profile)
        return simulator_missing()

    def generate(
        self, model: ir.Model, profile: Profile, folder: Path, request: Request, progress: Step
    ) -> Generated:
        """Search a schedule for every product, write circuit and host, and build the programs that simulate them.

        Raises:
            ModelError: A layer does not fit the accelerator, or an operator cannot run on the host.
            ProfileError: The profile's array contradicts itself.
            ToolchainError: A tool failed.
        """
        machine, program = machine_of(profile), extract_program(model)
        dots = dots_of(program)
        plans = {}
        for number, step in enumerate(dots):
            progress(number, len(dots) + 3, f"searching a schedule for {step.name}")
            plans[step.name] = plan_layer(step, program, machine)
        progress(len(dots), len(dots) + 3, "writing circuit and host")
        sources = write_sources(machine, folder)
        title = f"{profile.name}: {model.graph.name or 'model'}"
        tilings = {name: plan.tuned.best for name, plan in plans.items()}
        import_module(LOWERING).write_host(program, profile, machine, tilings, folder, title)
        _interface(program).write(folder)
        _write_cycles(plans, folder)
        progress(len(dots) + 1, len(dots) + 3, "translating the circuit for simulation")
        circuit_object(machine, timeout_s=request.timeout_s)
        build_programs(machine, folder, timeout_s=request.timeout_s)
        areas = [area_measurement(machine, profile.array)]
        if SYNTHESIS in request.steps:
            progress(len(dots) + 2, len(dots) + 3, "synthesizing the array")
            areas.append(_synthesized(machine, profile, request))
        found = list(plans.values())
        return Generated(
            notes=(
                f"{len(dots)} products on the {machine.rows}x{machine.columns} array, {machine.dataflow}",
            ),
            measurements=(*measurements(found, machine), *areas),
            tables=(layer_table(found, machine), schedule_table(found)),
            shipped=tuple(
                Path(name) for name in (*sources, "npu_kernels.c", "net.c", "net.h", "net_constants.c")
            ),
            not_generated=not_on_array(program),
            seconds=sum(plan.tuned.cycles for plan in found) / machine.clock_hz,
        )

    def why_not_executable(self, profile: Profile) -> str | None:
        """Return None: the artifact holds the programs that simulate it."""
        del profile
        return None

    def execute(
        self, folder: Path, feeds: Mapping[str, np.ndarray], profile: Profile, *, check: bool
    ) -> Simulation:
        """Run the network around the simulated circuit; with ``check`` compare every kernel, and the cycles.

        Raises:
            InternalError: The circuit takes other cycles than the model that schedules were chosen by.
        """
        del profile
        run = run_program(folder, CIRCUIT_PROGRAM, feeds)
        cycles = read_cycles(folder)
        found = Measurement(
            "Cycles of the circuit",
            f"{sum(run.cycles):,}",
            f"{len(run.cycles)} kernels simulated; the cycle model says {sum(cycles.values()):,}",
        )
        if not check:
            return Simulation(run.outputs, EXECUTED, (), (found,))
        _check_cycles(run, cycles, run_program(folder, MODEL_PROGRAM, feeds))
        return Simulation(run.outputs, EXECUTED, compare(run, program_in(folder)), (found,))


GENERATOR: Generator = Npu()


def dots_of(program: Program) -> list[Dot]:
    """Return the products that the array computes.

    Raises:
        ModelError: There is one that it cannot.
    """
    for step in program.steps:
        if isinstance(step, WeightOnlyDot):
            what = "the array multiplies 8-bit activations by weights with a scale a channel only"
            raise ModelError(what, where=step.name, fix="choose a recipe with static 8-bit activations")
    return [step for step in program.steps if isinstance(step, Dot)]


def plan_layer(step: Dot, program: Program, machine: Machine) -> LayerPlan:
    """Return the schedule of a product: the search's result, and what it is compared with."""
    geometry = geometry_of(step, program)
    problem = problem_of(geometry, machine)
    return LayerPlan(step.name, problem, _tuned(grid_of(problem, machine), machine))


@lru_cache(maxsize=256)
def _tuned(grid: Grid, machine: Machine) -> Tuned:
    """Search once for layers of one shape."""
    return tune(grid, machine)


def not_on_array(program: Program) -> dict[str, str]:
    """Return what the host computes: step -> why."""
    found = {}
    for step in program.steps:
        if isinstance(step, FloatIsland):
            found[step.name] = "float operators run on the host, in object code by TVM"
        elif not isinstance(step, Dot):
            found[step.name] = f"{type(step).__name__} runs on the host, in object code by TVM"
    return found


def _interface(program: Program) -> Interface:
    def port(name: str) -> Port:
        tensor = program.tensor(name)
        return Port(name, tensor.dtype, tensor.shape)

    return Interface(tuple(map(port, program.inputs)), tuple(map(port, program.outputs)), {})


def _write_cycles(plans: Mapping[str, LayerPlan], folder: Path) -> None:
    found = {
        name: {
            "cycles": plan.tuned.cycles,
            "first_legal_cycles": plan.tuned.first_cycles,
            "schedule": plan.tuned.best.label(),
        }
        for name, plan in plans.items()
    }
    (folder / CYCLES_FILE).write_text(json.dumps(found, indent=1) + "\n")


def _synthesized(machine: Machine, profile: Profile, request: Request) -> Measurement:
    assert profile.array is not None
    library = profile.array.liberty
    area = synthesized_area(machine, None if library is None else Path(library), timeout_s=request.timeout_s)
    return Measurement(
        "Area by synthesis",
        f"{area.total:,.0f} {area.unit}",
        f"array {area.cells:,.0f}, requantization {area.requantize:,.0f}; {area.source}; without memories and control",
    )


def _check_cycles(run: Run, predicted: Mapping[str, int], model: Run) -> None:
    """Compare the circuit's cycles with the search's and with the cycle model in C.

    Raises:
        InternalError: They differ.
    """
    on_array = [call.step or "" for call, _, _ in run.calls if call.intrinsic == ON_ARRAY]
    expected = tuple(predicted[step] for step in on_array)
    for other, name in ((expected, "the search's model"), (model.cycles, "the model in C")):
        if run.cycles != other:
            pairs = zip(on_array, run.cycles, other, strict=True)
            step, found, wanted = next(p for p in pairs if p[1] != p[2])
            what = f"the circuit takes {found} cycles, {name} says {wanted}"
            raise InternalError(what, where=step)


def compare(run: Run, program: Program) -> tuple[Check, ...]:
    """Return every integer kernel beside its reference, given the same inputs."""
    producers = {name: step for step in program.steps for name in step.outputs}
    checks = []
    for call, inputs, output in run.calls:
        if call.step is None:
            checks.append(Check(f"layout of {call.output.tensor}", call.function, output, inputs[0]))
            continue
        step = producers[call.output.tensor]
        given = {s.tensor: array for s, array in zip(call.inputs, inputs, strict=True)}
        values = {**program.constants, **given}
        expected = reference_step(step, program, tuple(values[name] for name in step.inputs))
        checks.append(Check(step.name, call.function, output, expected))
    return tuple(checks)


def program_in(folder: Path) -> Program:
    """Return the integer program of an artifact, kept for further executions."""
    path = folder / STATIC_MODEL
    return _program_once(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _program_once(path: Path, changed: int) -> Program:
    """Read a file once for many executions; ``changed`` tells another file of the same name apart."""
    del changed
    return extract_program(read_model(path).model)
