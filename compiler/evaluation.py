"""``evaluate``: a metric of a model as it stands, in ONNX Runtime."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.decoder import CompiledDecoder
from bitwright.compiler.decoding.context import context_of
from bitwright.compiler.decoding.perplexity import PerplexityMetric, PerplexityResult
from bitwright.compiler.decoding.ports import ModelRun, ports_of
from bitwright.compiler.generation.opening import MODEL_FILE, is_bundle, model_file, session_config
from bitwright.compiler.ingest.evaluator import load_eval
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ingest.stated_context import state_context
from bitwright.compiler.ort.session import callable_model, open_session


@dataclass(frozen=True)
class Evaluation:
    """What a model reached.

    Attributes:
        model: Its .onnx file, or the folder of a compiled one.
        metric: As the user named it.
        value: The metric, higher is better; minus the perplexity.
        seconds: How long it took.
        perplexity: Where that was the metric: its parts.
    """

    model: Path
    metric: str
    value: float
    seconds: float
    perplexity: PerplexityResult | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        parts = {} if self.perplexity is None else self.perplexity.to_dict()
        return {
            "model": str(self.model),
            "metric": self.metric,
            "value": self.value,
            **parts,
            "seconds": self.seconds,
        }


def evaluate_model(model: Path, metric: str, *, threads: int = 1) -> Evaluation:
    """Measure a metric of a model in ONNX Runtime, with the options of the .session.json beside it, or of an artifact.

    Args:
        model: An .onnx file, a folder with one, or what ``bitwright compile`` wrote.
        metric: ``perplexity:TOKENS`` or ``FILE.py:FUNC``.
        threads: Threads that compute; an artifact without caches takes as many as its profile has cores.

    Raises:
        UsageError: A file or function is missing.
        ModelError: The model is refused; for perplexity: it is no decoder.
        DataError: The metric fails, or its data do not fit the model.
        ToolchainError: The artifact cannot be executed here.
    """
    found = load_eval(metric)
    path, run = (model, _artifact(model, threads)) if is_bundle(model) else _in_session(model, threads)
    start = time.perf_counter()
    if not isinstance(found, PerplexityMetric):
        value = found(run)
        return Evaluation(path, metric, value, time.perf_counter() - start)
    result = found.result(run)
    return Evaluation(path, metric, -result.perplexity, time.perf_counter() - start, result)


def _in_session(model: Path, threads: int) -> tuple[Path, ModelRun]:
    path = model_file(model)
    graph = read_model(path).model  # refuses what nobody should execute
    state_context(graph, path)
    run = callable_model(open_session(path, session_config(path, threads)))
    return path, replace(run, context=context_of(graph))


def _artifact(folder: Path, threads: int) -> ModelRun:
    """Return a bundle's artifact as a function of the inputs of the model that it was compiled from."""
    bundle = Bundle.open(folder)
    graph = read_model(folder / MODEL_FILE).model.graph
    inputs, outputs = ports_of(graph.inputs), ports_of(graph.outputs)
    if bundle.rules is None or bundle.rules.cache is None:
        return ModelRun(bundle.run, inputs, outputs)
    decoder = CompiledDecoder(bundle, threads)
    tokens, logits = (
        next(port for port in ports if port.rank == rank) for ports, rank in ((inputs, 2), (outputs, 3))
    )

    def call(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        decoder.restart()
        return {logits.name: decoder.logits(feeds[tokens.name][0])[None]}

    return ModelRun(call, (tokens,), (logits,), decoder.capacity)
