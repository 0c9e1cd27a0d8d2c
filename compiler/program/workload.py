"""Which steps of a program are the same work for a kernel, whatever the model and its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bitwright.compiler.program.ops import Dot, Program, Step, Tensor, WeightOnlyDot

# Labels, and numbers that are data of the kernel: they are loaded or compared, and change no loop.
_NOT_COUNTED = frozenset({"name", "inputs", "outputs", "nodes", "lower", "upper"})


@dataclass(frozen=True)
class Workload:
    """Steps that one kernel computes in the same time.

    Attributes:
        key: Everything that determines a kernel's time, as stable text: operator, element types and shapes of all
            that is read and written, strides and the like, and what is fused behind it.
        steps: Names of the steps, in program order.
        label: The work in a few words, for tables.
    """

    key: str
    steps: tuple[str, ...]
    label: str

    @property
    def calls(self) -> int:
        """How often the model needs it."""
        return len(self.steps)


def tunable(step: Step) -> bool:
    """Tell whether backends have more than one way to compute a step."""
    return isinstance(step, Dot | WeightOnlyDot)


def workloads_of(programs: Iterable[Program]) -> tuple[Workload, ...]:
    """Return the tunable work of the programs of one library, in order of first use."""
    found: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    for program in programs:
        for step in filter(tunable, program.steps):
            key = workload_key(step, program)
            labels.setdefault(key, describe(step, program))
            found.setdefault(key, []).append(step.name)
    return tuple(Workload(key, tuple(steps), labels[key]) for key, steps in found.items())


def workload_key(step: Step, program: Program) -> str:
    """Return the identity of a step's work.

    The values of weights, scales and zero points are left out; their shapes and element types are not.
    """
    reads = ",".join(_tensor(program.tensor(name)) for name in step.inputs)
    writes = ",".join(_tensor(program.tensor(name)) for name in step.outputs)
    known = {f.name: getattr(step, f.name) for f in fields(step) if f.name not in _NOT_COUNTED}
    details = " ".join(f"{name}={_text(value)}" for name, value in sorted(known.items()) if _counts(value))
    return f"{type(step).__name__}({reads})->{writes} {details}"


def _counts(value: Any) -> bool:
    return value is not None and value is not False


def _tensor(tensor: Tensor) -> str:
    return f"{tensor.dtype}{_shape(tensor.shape)}"


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{'x'.join(map(str, shape))}]"


def _text(value: Any) -> str:
    """Write a field: arrays by type and shape, records by their fields, everything else as it is."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype.name}{_shape(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({','.join(map(_text, value))})"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{k}:{_text(v)}' for k, v in sorted(value.items()))}}}"
    if isinstance(value, float):
        return "float"
    if hasattr(value, "__dataclass_fields__"):
        inner = {f.name: getattr(value, f.name) for f in fields(value)}
        return f"{type(value).__name__}{_text(inner)}"
    return str(value)


def describe(step: Step, program: Program) -> str:
    """Return a step's work in a few words, for tables: ``QConv 1x16x32x32 -> 1x32x16x16``."""
    read, written = program.tensor(step.inputs[0]).shape, program.tensor(step.outputs[0]).shape
    weight = getattr(step, "weight", None)
    shape = f" * {'x'.join(map(str, weight.shape))}" if weight is not None else ""
    return f"{type(step).__name__[1:]} {'x'.join(map(str, read))}{shape} -> {'x'.join(map(str, written))}"
