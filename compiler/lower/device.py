"""What differs between lowering for the host's processor and lowering for another one, e.g. a graphics processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from bitwright.compiler.lower.kernels.edge import dequantize, quantize
from bitwright.compiler.lower.kernels.elementwise import add, look_up, multiply
from bitwright.compiler.lower.kernels.move import concat, move, reorder
from bitwright.compiler.lower.kernels.pool import pool
from bitwright.compiler.lower.layout import Order
from bitwright.compiler.program.ops import (
    Dequantize,
    Move,
    Program,
    QAdd,
    QConcat,
    QLut,
    QMul,
    QPool,
    Quantize,
    Step,
    Tensor,
)
from bitwright.targets.backend import Kernel

# In a job's folder for the device: objects of the library that this machine calls.
HOST_OBJECTS = "host"
StepKernel: TypeAlias = Callable[[Step, Program, Mapping[str, Order]], Kernel]
Reorder: TypeAlias = Callable[[Tensor, Order, Order], Kernel]


@dataclass(frozen=True)
class Device:
    """How integer steps that are no dot products, and float operators, become kernels.

    Attributes:
        step: Gives the kernel of a pooling, elementwise, moving or quantizing step, for the storage orders of its
            tensors.
        reorder: Gives the kernel that copies a tensor from one storage order to another.
        optimize: Legalizes, fuses and schedules float operators: (module, TVM's target) -> module.
        finish: Relax passes behind memory planning.
        emulated: Fields of ``tvm.target.Target`` that the module is compiled for once more, with the same kernels for
            the device: this machine calls them then; None where the target's host is this machine.
    """

    step: StepKernel
    reorder: Reorder
    optimize: Callable[[Any, Any], Any]
    finish: Sequence[Any] = ()
    emulated: Mapping[str, Any] | None = None


_STEPS: dict[type[Step], Callable[..., Kernel]] = {
    QAdd: add,
    QMul: multiply,
    QLut: look_up,
    QConcat: concat,
    QPool: pool,
    Quantize: quantize,
    Dequantize: dequantize,
    Move: move,
}


def host_step(step: Step, program: Program, orders: Mapping[str, Order]) -> Kernel:
    """Return the kernel of a step for a processor with vectors and a thread pool."""
    return _STEPS[type(step)](step, program, orders)


host_reorder: Reorder = reorder
