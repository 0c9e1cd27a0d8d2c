"""From the integer program to a TFLite graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from bitwright.compiler.graph.model import node_label
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import Move, Program, QAdd, QConcat, QConv, QGemm, QLut, QMul, QPool, Step
from bitwright.targets.ethos_u.functions import LookUp, operator_for
from bitwright.targets.ethos_u.integer_steps import IntegerSteps, QSoftmax, integer_steps
from bitwright.targets.ethos_u.tflite_graph import TfliteGraph
from bitwright.targets.ethos_u.translate_dot import convolution, fully_connected
from bitwright.targets.ethos_u.translate_moves import moved
from bitwright.targets.ethos_u.translate_pointwise import (
    concatenation,
    elementwise,
    function,
    pooling,
    softmax,
)
from bitwright.targets.ethos_u.translator import Translator, UnsupportedStepError


@dataclass(frozen=True)
class Translation:
    """A model as a TFLite graph.

    Attributes:
        steps: What it computes.
        graph: The graph; None if something was refused.
        functions: Step -> the operator that stands for its table.
        refused: ONNX node -> why it has no form in the graph.
    """

    steps: IntegerSteps
    graph: TfliteGraph | None
    functions: Mapping[str, LookUp]
    refused: Mapping[str, str]

    @property
    def program(self) -> Program:
        """The whole integer program."""
        return self.steps.program


def translate(model: ir.Model) -> Translation:
    """Translate a Q/DQ model with static shapes.

    Args:
        model: The model; it is not changed.
    """
    slopes = {n.attributes.get_float("alpha", 0.01) for n in model.graph if n.op_type == "LeakyRelu"}
    found = translate_program(extract_program(model), tuple(slopes))
    types = {node_label(node): node.op_type for node in model.graph}
    typed = {n: f"{types[n]}: {why}" if n in types else why for n, why in found.refused.items()}
    return replace(found, refused=typed)


def translate_program(program: Program, slopes: tuple[float, ...] = ()) -> Translation:
    """Translate an integer program.

    Args:
        program: The program.
        slopes: Slopes that a LeakyRelu may have.
    """
    steps = integer_steps(program)
    translator = Translator(steps.program, tuple(steps.inputs.values()))
    functions: dict[str, LookUp] = {}
    refused = dict(steps.refused)
    if not refused:
        for step in steps.steps:
            translator.begin(step.name)
            try:
                _emit(translator, step, functions, slopes)
            except UnsupportedStepError as error:
                refused[step.nodes[0] if step.nodes else step.name] = str(error)
                break
    graph = None if refused else translator.graph(steps.inputs, steps.outputs)
    return Translation(steps, graph, functions, refused)


def _emit(t: Translator, step: Step, functions: dict[str, LookUp], slopes: tuple[float, ...]) -> None:
    match step:
        case QConv():
            convolution(t, step)
        case QGemm():
            fully_connected(t, step)
        case QAdd() | QMul():
            elementwise(t, step)
        case QPool():
            pooling(t, step)
        case QConcat():
            concatenation(t, step)
        case QSoftmax():
            softmax(t, step)
        case QLut():
            quants = t.quant(step.inputs[0]), t.quant(step.output)
            found = operator_for(step.table, *quants, slopes)
            if found is None:
                msg = f"the accelerator has no operator for '{step.function}'"
                raise UnsupportedStepError(msg)
            functions[step.name] = found
            function(t, step, found)
        case Move():
            moved(t, step)
        case _:
            msg = f"{type(step).__name__} is no integer operator of the accelerator"
            raise UnsupportedStepError(msg)
