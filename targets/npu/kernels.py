"""The dot products of a program as kernels that command the accelerator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.compiler.errors import ModelError
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.compiler.program.ops import Dot, Program, Step
from bitwright.targets.backend import Kernel
from bitwright.targets.npu.machine import Machine
from bitwright.targets.npu.problem import packed_parameters, packed_weights, problem_of
from bitwright.targets.npu.schedule import scheduled
from bitwright.targets.npu.tiling import Tiling, grid_of
from bitwright.targets.npu.workload import Output, Workload
from bitwright.targets.schema import Profile


@dataclass(frozen=True)
class DotKernels:
    """Gives each step the kernel of its schedule.

    Attributes:
        machine: The accelerator.
        tilings: Step -> its schedule.
    """

    machine: Machine
    tilings: Mapping[str, Tiling]

    def __call__(self, step: Step, program: Program, profile: Profile) -> Kernel:
        """Return the kernel of a QGemm or QConv step.

        Raises:
            ModelError: Its numbers do not fit the accelerator's, or it is another kind of step.
            PerformanceGateError: Its output is float.
        """
        del profile
        if not isinstance(step, Dot):
            what = "the array multiplies 8-bit activations by weights with a scale a channel only"
            raise ModelError(what, where=step.name, fix="choose a recipe with static 8-bit activations")
        workload = workload_of(step, program, self.machine, self.tilings[step.name])
        geometry, problem = workload.geometry, workload.problem
        weights = packed_weights(step, geometry, problem, self.machine)
        parameters = packed_parameters(step, program, problem, self.machine)
        return Kernel(
            key=f"npu|{workload}",
            function=scheduled(workload),
            constants=(weights, parameters),
            output_shape=geometry.output_shape,
            output_dtype="int8",
            intrinsic="systolic",
        )


def workload_of(step: Dot, program: Program, machine: Machine, tiling: Tiling) -> Workload:
    """Return the numbers of a step's kernel.

    Raises:
        ModelError: Its activations are unsigned.
    """
    source, output = program.tensor(step.inputs[0]), program.tensor(step.output)
    assert source.quant is not None
    if source.dtype != "int8" or output.dtype != "int8" or output.quant is None:
        what = f"the array reads and writes int8, not {source.dtype} and {output.dtype}"
        raise ModelError(what, where=step.name, fix="let the profile's qspaces be signed")
    geometry = geometry_of(step, program)
    problem = problem_of(geometry, machine)
    return Workload(
        geometry,
        problem,
        grid_of(problem, machine),
        tiling,
        machine,
        source.quant.zero_point,
        Output(output.quant.zero_point, step.lower, step.upper),
    )
