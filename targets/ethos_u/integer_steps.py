"""The steps that the accelerator has to compute: integers between one quantizer at the inputs and the outputs.

A Softmax stands in the program as a float island between a Dequantize and a Quantize; here the three are one integer
step. What else is left in float cannot run on the accelerator, and is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from bitwright.compiler.program.ops import (
    Dequantize,
    FloatIsland,
    Program,
    Quantize,
    Step,
)


@dataclass(frozen=True, kw_only=True)
class QSoftmax(Step):
    """Softmax along the last axis; the output has scale 1/256 and zero point -128."""


@dataclass(frozen=True)
class IntegerSteps:
    """A program without its float edges.

    Attributes:
        program: The whole program.
        steps: Integer steps in topological order.
        inputs: Graph input -> the integer tensor that it is quantized to (itself, if it is one already).
        outputs: Graph output -> the integer tensor that it is the dequantization of (itself, if it is one already).
        refused: ONNX node -> why it cannot be one of the steps.
    """

    program: Program
    steps: tuple[Step, ...]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    refused: Mapping[str, str]


def integer_steps(program: Program) -> IntegerSteps:
    """Cut the float edges off a program."""
    return _Cutter(program).cut()


class _Cutter:
    def __init__(self, program: Program) -> None:
        self._program = program
        self._writers = {name: step for step in program.steps for name in step.outputs}
        self._steps: list[Step] = []
        self._inputs: dict[str, str] = {}
        self._outputs: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._softmax: set[str] = set()

    def cut(self) -> IntegerSteps:
        program = self._program
        for name in program.inputs:
            if program.tensor(name).quant is not None:
                self._inputs[name] = name
        for step in program.steps:
            self._visit(step)
        for name in program.outputs:
            self._output(name)
        return IntegerSteps(program, tuple(self._steps), self._inputs, self._outputs, self._refused)

    def _visit(self, step: Step) -> None:
        if isinstance(step, Quantize):
            self._quantize(step)
        elif isinstance(step, FloatIsland):
            self._island(step)
        elif isinstance(step, Dequantize):
            return
        elif any(self._program.tensor(name).quant is None for name in (*step.inputs, *step.outputs)):
            self._refuse(step, "its operands or its result are not 8-bit integers")
        else:
            self._steps.append(step)

    def _quantize(self, step: Quantize) -> None:
        source = step.inputs[0]
        if source in self._softmax:
            island = self._writers[source]
            values = self._writers[island.inputs[0]].inputs
            nodes = (*island.nodes, *step.nodes)
            self._steps.append(
                QSoftmax(name=island.nodes[0], inputs=values, outputs=step.outputs, nodes=nodes)
            )
        elif source in self._program.inputs and source not in self._inputs:
            self._inputs[source] = step.output
        elif source in self._inputs:
            self._refuse(step, f"the input '{source}' is quantized in two ways")
        elif not isinstance(self._writers[source], FloatIsland):
            self._refuse(step, "it quantizes what is no input of the model")

    def _island(self, step: FloatIsland) -> None:
        if self._is_softmax(step):
            self._softmax.add(step.output)
            return
        for node in step.model.graph:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant"):
                why = f"{node.op_type} is computed in float"
                self._refused[node.name or step.name] = why

    def _is_softmax(self, step: FloatIsland) -> bool:
        nodes = list(step.model.graph)
        if len(nodes) != 1 or nodes[0].op_type != "Softmax" or len(step.inputs) != 1:
            return False
        source = self._writers.get(step.inputs[0])
        if not isinstance(source, Dequantize) or not _last_axis(nodes[0], len(self._shape(step.output))):
            return False
        readers = [s for s in self._program.steps if step.output in s.inputs]
        return bool(readers) and all(isinstance(s, Quantize) for s in readers)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._program.tensor(name).shape

    def _output(self, name: str) -> None:
        writer = self._writers.get(name)
        if isinstance(writer, Dequantize):
            self._outputs[name] = writer.inputs[0]
        elif self._program.tensor(name).quant is not None:
            self._outputs[name] = name
        elif writer is None:
            self._refused[name] = "this output of the model is no result of a layer"
        elif not isinstance(writer, FloatIsland):
            self._refuse(writer, "its result is float")

    def _refuse(self, step: Step, why: str) -> None:
        self._refused[step.nodes[0] if step.nodes else step.name] = why


def _last_axis(node: ir.Node, rank: int) -> bool:
    return node.attributes.get_int("axis", -1) in (-1, rank - 1)
