"""Executing a TFLite file as its host would, and every layer of it against its integer model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from bitwright.compiler.errors import DataError, PerformanceGateError
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.program.affine import dequantize, quantize
from bitwright.compiler.program.ops import Move
from bitwright.targets.ethos_u.reference import Reference
from bitwright.targets.ethos_u.tflite_graph import TfliteGraph
from bitwright.targets.ethos_u.translate import Translation, translate
from bitwright.targets.generator import Check
from bitwright.targets.schema import Requantize


def accepted(translation: Translation) -> TfliteGraph:
    """Return the graph of a translation that refused nothing.

    Raises:
        PerformanceGateError: It refused something, named in the message.
    """
    if translation.graph is not None:
        return translation.graph
    named = "\n  ".join(f"'{node}': {why}" for node, why in translation.refused.items())
    what = f"{len(translation.refused)} operators would not run on the accelerator:\n  {named}"
    raise PerformanceGateError(
        what, where="model", fix="replace these operators, or cut the model before them"
    )


def host_inputs(translation: Translation, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the host writes into the file's inputs: quantized, in the order of storage.

    Raises:
        DataError: An input is missing, or of another shape or type.
    """
    given = {}
    program = translation.program
    for name, stored in accepted(translation).inputs.items():
        expected, integers = program.tensor(name), program.tensor(translation.steps.inputs[name])
        if (
            name not in feeds
            or feeds[name].shape != expected.shape
            or feeds[name].dtype.name != expected.dtype
        ):
            what = f"the model takes {expected.dtype} {list(expected.shape)}"
            raise DataError(what, where=f"input '{name}'")
        assert integers.quant is not None
        values = feeds[name] if integers.name == name else quantize(feeds[name], integers.quant)
        given[stored.tensor] = stored.to_file(values)
    return given


def host_outputs(translation: Translation, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the outputs as the Q/DQ model has them, from what the file left in its own."""
    outputs = {}
    for name, stored in accepted(translation).outputs.items():
        tensor = translation.program.tensor(translation.steps.outputs[name])
        logical = stored.to_logical(found[stored.tensor], tensor.shape)
        assert tensor.quant is not None
        outputs[name] = logical if tensor.name == name else dequantize(logical, tensor.quant)
    return outputs


def compare_layers(
    translation: Translation, recorded: Mapping[str, np.ndarray], requantization: Requantize
) -> Iterator[Check]:
    """Yield each step with what the file computed and what its integer model computes from the same inputs.

    Args:
        translation: What the file was written from.
        recorded: Every activation of the file, as it is stored.
        requantization: How accumulators become outputs.
    """
    graph, program = accepted(translation), translation.program
    reference = Reference(program, requantization, translation.functions)

    def logical(name: str) -> np.ndarray:
        if name in program.constants:
            return program.constants[name]
        stored = graph.stored[name]
        return stored.to_logical(recorded[stored.tensor], program.tensor(name).shape)

    for step in translation.steps.steps:
        operators = [layer.operator for layer in graph.layers if layer.step == step.name]
        if not operators and isinstance(step, Move):
            continue  # a change of what is remembered, nothing is computed
        expected = reference.run(step, tuple(logical(name) for name in step.inputs))
        yield Check(step.name, " + ".join(operators), logical(step.output), expected)


def translated(path: Path) -> Translation:
    """Return the translation of a model file, kept for further executions."""
    return _translated_once(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _translated_once(path: Path, changed: int) -> Translation:
    """Translate a file once for many executions; ``changed`` tells another file of the same name apart."""
    del changed
    return translate(read_model(path).model)
