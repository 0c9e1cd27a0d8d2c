"""One packed form of every weight for all functions of a library.

Kernels of different sizes like their weights in different orders. Equal constants are stored once, so the functions of
one model should agree: the largest function chooses, because it has the most work for each weight, and the others take
the best of their kernels that reads the same bytes. Where none does, that weight is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from bitwright.compiler.lower.relax_module import DotKernel
from bitwright.compiler.program.ops import Program, Step
from bitwright.targets.backend import Backend, Kernel, KernelChoice
from bitwright.targets.schema import Profile

# Candidates are in the order of their estimated cost; far down the list two copies are the better choice.
MOST_TRIED = 8
# Tile configurations, for example: they follow the shape, and nobody minds another copy.
SMALL_BYTES = 1024


def by_size(programs: Mapping[str, Program]) -> dict[str, Program]:
    """Return programs ordered by the elements of their inputs, the largest first."""

    def elements(item: tuple[str, Program]) -> int:
        return sum(prod(item[1].tensor(name).shape) for name in item[1].inputs)

    return dict(sorted(programs.items(), key=elements, reverse=True))


def sharing(dot_kernel: DotKernel, backend: Backend) -> DotKernel:
    """Return kernels like ``dot_kernel``'s whose constants equal those of the first kernel of the same step.

    Args:
        dot_kernel: The kernel of a step if nothing else is known.
        backend: For other kernels of a step.
    """
    first: dict[str, Kernel] = {}
    widths: dict[str, int | None] = {}

    def shared(step: Step, program: Program, profile: Profile) -> Kernel:
        kernel = dot_kernel(step, program, profile)
        known = first.setdefault(step.name, kernel)
        if step.name not in widths:
            widths[step.name] = _width(backend.candidates(step, program, profile)[0])
        if _equal(kernel.constants, known.constants):
            return kernel
        choices = [c for c in backend.candidates(step, program, profile) if c.intrinsic == known.intrinsic]
        # Packing takes time, and most templates pack by how many vectors of columns a block has.
        choices.sort(key=lambda choice: _width(choice) != widths[step.name])
        for choice in choices[:MOST_TRIED]:
            other = backend.dot_kernel(step, program, profile, choice)
            if _equal(other.constants, known.constants):
                return other
        return kernel

    return shared


def _width(choice: KernelChoice) -> int | None:
    return dict(choice.params).get("vectors")


def _equal(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    """Tell whether two kernels read the same weights; what is small may differ."""
    first, second = ([a for a in arrays if a.nbytes > SMALL_BYTES] for arrays in (some, others))
    return len(first) == len(second) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(first, second, strict=True)
    )
