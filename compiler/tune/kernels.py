"""Candidates as machine code: several ways to compute one step in one TVM module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from bitwright.compiler.errors import BitwrightError
from bitwright.compiler.lower.compile import export_objects
from bitwright.compiler.program.ops import Program, Step
from bitwright.targets.backend import Backend, Kernel, KernelChoice
from bitwright.targets.schema import Profile

# Bytes that an output holds before a kernel runs: what it forgets to write is seen.
UNWRITTEN = 0x5A


@dataclass(frozen=True)
class Candidate:
    """One way to compute a step.

    Attributes:
        choice: The template and its parameters.
        symbol: Its function in the module.
        kernel: Function and constants.
    """

    choice: KernelChoice
    symbol: str
    kernel: Kernel


@dataclass(frozen=True)
class Batch:
    """Candidates of one step, compiled together.

    Attributes:
        candidates: Those that could be built.
        failed: Choice -> why it could not.
        executable: What ``tvm.compile`` returned; None if nothing could be built.
    """

    candidates: tuple[Candidate, ...]
    failed: Mapping[KernelChoice, str]
    executable: Any


@dataclass(frozen=True)
class Bench:
    """A step on the bench: makes its candidates and what they are called with.

    Attributes:
        step: The step.
        program: Its program.
        profile: Target.
        backend: The target's family.
    """

    step: Step
    program: Program
    profile: Profile
    backend: Backend

    def build(self, choices: Sequence[KernelChoice]) -> Batch:
        """Compile candidates; one that cannot be built does not stop the others."""
        made: list[Candidate] = []
        failed: dict[KernelChoice, str] = {}
        for number, choice in enumerate(choices):
            try:
                kernel = self.backend.dot_kernel(self.step, self.program, self.profile, choice)
                made.append(Candidate(choice, f"candidate_{number}", kernel))
            except Exception as error:  # a template's own bug in one corner of its space
                failed[choice] = _reason(error)
        try:
            return Batch(tuple(made), failed, self._compile(made) if made else None)
        except Exception:
            good = [c for c in made if self._compiles(c, failed)]
            return Batch(tuple(good), failed, self._compile(good) if good else None)

    def _compiles(self, candidate: Candidate, failed: dict[KernelChoice, str]) -> bool:
        """Tell whether a candidate compiles by itself; if not, note why in ``failed``."""
        try:
            self._compile([candidate])
        except Exception as error:
            failed[candidate.choice] = _reason(error)
            return False
        return True

    def _compile(self, candidates: Sequence[Candidate]) -> Any:
        functions = {
            c.symbol: c.kernel.function.without_attr("global_symbol").with_attr("global_symbol", c.symbol)
            for c in candidates
        }
        target = tvm.target.Target(self.backend.tvm_target(self.profile))
        return tvm.compile(tvm.IRModule(functions), target=target)

    def library(self, batch: Batch, folder: Path) -> Path:
        """Link a batch into a shared library for the target."""
        objects = folder / "objects"
        objects.mkdir()
        library = folder / "candidates.so"
        self.backend.link(export_objects(batch.executable, objects), library, self.profile)
        return library

    def arguments(self, kernel: Kernel) -> list[np.ndarray]:
        """Return what a kernel is called with: the same activations for every candidate, constants, an output."""
        parameters = kernel.function.params
        count = len(parameters) - len(kernel.constants) - 1
        random = np.random.default_rng(0)
        found = [_activation(random, kernel, k) for k in range(count)]
        unwritten = np.empty(kernel.output_shape, kernel.output_dtype)
        unwritten.reshape(-1).view(np.uint8)[:] = UNWRITTEN
        return [*found, *kernel.constants, unwritten]


def _activation(random: np.random.Generator, kernel: Kernel, position: int) -> np.ndarray:
    kind = kernel.function.params[position].ty
    shape, dtype = tuple(int(d) for d in kind.shape), str(kind.dtype)
    if np.issubdtype(np.dtype(dtype), np.floating):
        return random.normal(size=shape).astype(dtype)
    bounds = np.iinfo(dtype)
    return random.integers(bounds.min, bounds.max, shape, dtype, endpoint=True)


def _reason(error: Exception) -> str:
    if isinstance(error, BitwrightError):
        return error.what
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
