"""From a program to the files of a static executor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm

from bitwright.compiler.errors import ModelError, ToolchainError
from bitwright.compiler.lower.compile import optimize
from bitwright.compiler.lower.kernel_table import KernelCall
from bitwright.compiler.lower.relax_module import DotKernel, LoweredModule, build_module
from bitwright.compiler.lower.static_c import emit
from bitwright.compiler.lower.static_c.kernels import RawKernels, raw_kernels, write_object
from bitwright.compiler.lower.static_c.network import (
    MemoryPlan,
    Network,
    check_limits,
    plan_memory,
    with_stack,
)
from bitwright.compiler.lower.static_c.read_relax import called_functions, read_network
from bitwright.compiler.program.ops import Program
from bitwright.targets.schema import Profile


@dataclass(frozen=True)
class StaticModel:
    """A model that is planned but not compiled.

    Attributes:
        network: Its calls.
        plan: Its memory.
        kernels: Its functions before code generation.
        kernel_table: Its integer kernel calls.
    """

    network: Network
    plan: MemoryPlan
    kernels: RawKernels
    kernel_table: tuple[KernelCall, ...]


def plan_static(
    program: Program,
    profile: Profile,
    dot_kernel: DotKernel,
    target: dict[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> StaticModel:
    """Lower a program as far as its memory plan.

    Args:
        program: Static shapes.
        profile: Target; its limits are enforced.
        dot_kernel: Gives the kernel of a QGemm or QConv step.
        target: Fields of ``tvm.target.Target``.
        progress: Called with each step's name before it is lowered.

    Raises:
        ModelError: An operator cannot run without a runtime.
        InfeasibleBudgetError: The device has less memory than the plan.
    """
    lowered = _module(program, profile, dot_kernel, progress)
    module = optimize(lowered.ir_module, tvm.target.Target(target))
    wanted = called_functions(module["main"])
    functions = {v: f for v, f in module.functions_items() if v.name_hint in wanted}
    kernels = raw_kernels(tvm.IRModule(functions), target)
    network = read_network(module["main"], program, lowered.kernel_table, kernels.scratch)
    plan = plan_memory(network, kernels.locals)
    check_limits(plan, profile.limits, profile.name)
    return StaticModel(network, plan, kernels, lowered.kernel_table)


def write_static(
    model: StaticModel, target: dict[str, Any], profile: Profile, title: str, folder: Path
) -> tuple[tuple[str, ...], MemoryPlan]:
    """Generate machine code and C source into an existing folder.

    Args:
        model: From ``plan_static``.
        target: Fields of ``tvm.target.Target``.
        profile: Has further features for float operators.
        title: What the comments of the source begin with.
        folder: Receives the files.

    Returns:
        Their names, and the memory plan with the stack that the machine code takes.

    Raises:
        InfeasibleBudgetError: With that the device has too little memory.
    """
    integer = {call.function for call in model.kernel_table}
    objects = {emit.OBJECT_FILE: (integer, target)}
    if rest := {call.function for call in model.network.calls} - integer:
        features = [*target.get("mattr", ()), *profile.codegen.float_mattr]
        objects[emit.FLOAT_OBJECT_FILE] = (rest, {**target, "mattr": features} if features else target)
    needs: dict[str, int] = {}
    for name, (functions, machine) in objects.items():
        needs |= write_object(model.kernels, functions, machine, folder / name)
    plan = with_stack(model.network, model.plan, needs)
    check_limits(plan, profile.limits, profile.name)
    texts = {
        emit.HEADER_FILE: emit.header(model.network, plan, title),
        emit.SOURCE_FILE: emit.source(model.network, plan, title),
        emit.CONSTANTS_FILE: emit.constants_source(model.network, title),
        emit.RECORD_FILE: emit.record(model.network, plan),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return (*objects, *texts), plan


def _module(
    program: Program, profile: Profile, dot_kernel: DotKernel, progress: Callable[[str], None]
) -> LoweredModule:
    try:
        return build_module(program, profile, dot_kernel, progress)
    except ToolchainError as error:
        fix = f"target {profile.name} has no runtime that could take it over; choose another target"
        raise ModelError(error.what, where=error.where, fix=fix) from error
