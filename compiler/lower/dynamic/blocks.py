"""Which kernels a dynamic function has: how many elements dot products take at once, and what calls cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

from bitwright.compiler.lower.dynamic.functions import Blocks, Larger
from bitwright.compiler.lower.kernel_table import KernelCall
from bitwright.compiler.lower.relax_module import DotKernel
from bitwright.compiler.program.ops import Dot, Program, Step, WeightOnlyDot
from bitwright.targets.schema import Profile

# Elements of a block. Few enough that the code stays small, far enough apart that each pays.
BLOCKS = (64, 16, 4)
# Rows of a product after which its weights are read often enough. With 64 (four tiles of AMX) a small convolutional
# network took 1.40 times as long as a function for just its batch, with 1024 it takes 1.24.
MOST_ROWS = 1024
# Multiply-accumulates that take as long as writing a value.
PRODUCTS_OF_A_VALUE = 128


def dot_blocks(program: Program, profile: Profile, dot_kernel: DotKernel) -> Blocks:
    """Return the kernels for several elements of every dot product of a program for one.

    Args:
        program: For one element.
        profile: Passed on to ``dot_kernel``.
        dot_kernel: Is asked for the largest block of a step first.
    """
    found = {
        step.output: tuple(
            Larger(elements, dot_kernel(step, _for_elements(program, step, elements), profile))
            for elements in BLOCKS
            if elements * _rows(program, step) <= MOST_ROWS
        )
        for step in program.steps
        if isinstance(step, Dot | WeightOnlyDot)
    }

    def blocks(call: KernelCall) -> tuple[Larger, ...]:
        return found.get(call.output.tensor, ()) if call.step is not None else ()

    return blocks


def call_costs(program: Program) -> Callable[[KernelCall], int]:
    """Return what every kernel call of a program costs, in values written."""
    steps = {step.output: step for step in program.steps if isinstance(step, Dot | WeightOnlyDot)}

    def cost(call: KernelCall) -> int:
        written = prod(call.output.shape)
        step = steps.get(call.output.tensor) if call.step is not None else None
        if step is None:
            return written
        return written + _rows(program, step) * step.weight.size // PRODUCTS_OF_A_VALUE

    return cost


def _rows(program: Program, step: Dot | WeightOnlyDot) -> int:
    """Return the rows of the product: output values of one channel."""
    channels = step.scale.shape[1] if isinstance(step, WeightOnlyDot) else step.weight_scale.size
    return prod(program.tensor(step.output).shape) // channels


def _for_elements(program: Program, step: Step, elements: int) -> Program:
    """Return the program with the tensors of one step as large as for several elements."""
    names = (step.inputs[0], *step.outputs)
    tensors = {name: program.tensor(name) for name in names}
    larger = {
        name: replace(tensor, shape=(tensor.shape[0] * elements, *tensor.shape[1:]))
        for name, tensor in tensors.items()
    }
    return replace(program, tensors={**program.tensors, **larger})
