"""Parts of a program by who executes them: the compiled library, or ONNX Runtime for what cannot be lowered.

Levels alternate: even ones are the library's, odd ones ONNX Runtime's. A step's level is the smallest of its
executor's that is not below that of any step it reads from, so running the levels in order respects every
dependency, with as few switches as the dependencies allow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from bitwright.compiler.graph.model import node_label, static_shape
from bitwright.compiler.program.cut import join_models
from bitwright.compiler.program.narrow import WhyNot, boundary, narrowed, raised
from bitwright.compiler.program.ops import FloatIsland, Program, Step, Tensor

Executor = Literal["kernels", "onnxruntime"]
EXECUTORS: tuple[Executor, Executor] = ("kernels", "onnxruntime")


@dataclass(frozen=True)
class NotLowered:
    """Connected nodes that are left to ONNX Runtime.

    Attributes:
        nodes: Their names; those that only move values to or from the others are among them.
        operators: Their operators, each once.
        reason: What cannot be lowered and why.
    """

    nodes: tuple[str, ...]
    operators: tuple[str, ...]
    reason: str

    def sentence(self) -> str:
        """Return the finding in words."""
        return f"left to ONNX Runtime: {len(self.nodes)} nodes ({', '.join(self.operators)}): {self.reason}"


@dataclass(frozen=True)
class Segment:
    """The steps of one level.

    Attributes:
        executor: ``"kernels"``: the compiled library. ``"onnxruntime"``: all steps are float islands.
        program: Its inputs are the tensors it reads from before, its outputs those that later segments or the
            model's outputs need; integer tensors may be among both.
    """

    executor: Executor
    program: Program

    def onnx_model(self) -> ir.Model:
        """Return the ONNX model of a segment that is left to ONNX Runtime."""
        return join_models([step.model for step in self.program.steps if isinstance(step, FloatIsland)])


@dataclass(frozen=True)
class Split:
    """A program in segments, in the order of execution.

    Attributes:
        segments: At least one.
        not_lowered: What is left to ONNX Runtime; empty if the only segment is the whole program.
    """

    segments: tuple[Segment, ...]
    not_lowered: tuple[NotLowered, ...]


def split_program(program: Program, why_not: WhyNot) -> Split:
    """Split a program into segments.

    A model output that is a model input belongs to no segment.

    Args:
        program: It is not changed.
        why_not: Returns why a float island cannot be lowered, or None if it can. Asked for every island, and
            for parts of those that cannot be, so that only what must be goes to ONNX Runtime.
    """
    steps: list[Step] = []
    tensors = dict(program.tensors)
    reasons: dict[str, str] = {}
    taken = {step.name for step in program.steps}
    for step in program.steps:
        reason = why_not(step) if isinstance(step, FloatIsland) else None
        if reason is None or not isinstance(step, FloatIsland):
            steps.append(step)
            continue
        for part, why in narrowed(step, reason, why_not, taken):
            steps.append(part)
            tensors |= {n: _tensor(v) for n, v in boundary(part.model).items() if n not in tensors}
            reasons |= {} if why is None else {part.name: why}
    whole = replace(program, steps=tuple(steps), tensors=tensors)
    found = [
        _not_lowered(s, reasons[s.name]) for s in steps if isinstance(s, FloatIsland) and s.name in reasons
    ]
    return Split(tuple(_segments(whole, reasons)), tuple(found))


def _tensor(value: ir.Value) -> Tensor:
    shape = static_shape(value)
    assert shape is not None and value.dtype is not None
    return Tensor(value.name or "", shape, value.dtype.numpy().name)


def _not_lowered(island: FloatIsland, reason: str) -> NotLowered:
    nodes = [n for n in island.model.graph if node_label(n) in island.nodes]
    operators = {f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes}
    return NotLowered(island.nodes, tuple(sorted(operators)), reason)


def _segments(program: Program, left: Collection[str]) -> Iterator[Segment]:
    """Yield one segment for each level that holds steps.

    Args:
        program: A whole program.
        left: Names of the steps that are left to ONNX Runtime.
    """
    constants = [n for n in program.outputs if n in program.constants]
    levels: dict[int, list[Step]] = defaultdict(list)
    if constants or not program.steps:
        levels[0] = []  # constant outputs are the library's, and there is always one segment
    level_of: dict[str, int] = {}
    for step in program.steps:
        level = raised(max((level_of.get(n, 0) for n in step.inputs), default=0), step.name in left)
        levels[level].append(step)
        level_of |= dict.fromkeys(step.outputs, level)
    for level in sorted(levels):
        later = {n for k, steps in levels.items() if k > level for s in steps for n in s.inputs}
        part = _part(program, levels[level], later, constants if level == 0 else [])
        yield Segment(EXECUTORS[level % 2], part)


def _part(
    program: Program, steps: Sequence[Step], later: Collection[str], constant_outputs: Sequence[str]
) -> Program:
    """Return some steps as a program; ``later`` are the tensors that other steps read afterwards."""
    reads = list(dict.fromkeys(n for s in steps for n in s.inputs))
    written = [n for s in steps for n in s.outputs]
    inputs = tuple(n for n in reads if n not in written and n not in program.constants)
    outputs = (*(n for n in written if n in later or n in program.outputs), *constant_outputs)
    constants = {n: program.constants[n] for n in (*reads, *constant_outputs) if n in program.constants}
    names = dict.fromkeys((*reads, *written, *constant_outputs))
    return Program(inputs, outputs, tuple(steps), {n: program.tensor(n) for n in names}, constants)
