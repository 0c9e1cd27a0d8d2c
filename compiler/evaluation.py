"""``evaluate``: a metric of a model as it stands, in ONNX Runtime."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bitwright.compiler.decoding.perplexity import PerplexityMetric, PerplexityResult
from bitwright.compiler.generation.opening import model_file, session_config
from bitwright.compiler.ingest.evaluator import load_eval
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ort.session import callable_model, open_session


@dataclass(frozen=True)
class Evaluation:
    """What a model reached.

    Attributes:
        model: Its .onnx file.
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
    """Measure a metric of a model, with the options of the .session.json beside it.

    Args:
        model: An .onnx file, or a folder with one.
        metric: ``perplexity:TOKENS`` or ``FILE.py:FUNC``.
        threads: Threads that compute.

    Raises:
        UsageError: A file or function is missing.
        ModelError: The model is refused; for perplexity: it is no decoder.
        DataError: The metric fails, or its data do not fit the model.
    """
    path = model_file(model)
    found = load_eval(metric)
    read_model(path)  # refuses what nobody should execute
    run = callable_model(open_session(path, session_config(path, threads)))
    start = time.perf_counter()
    if not isinstance(found, PerplexityMetric):
        value = found(run)
        return Evaluation(path, metric, value, time.perf_counter() - start)
    result = found.result(run)
    return Evaluation(path, metric, -result.perplexity, time.perf_counter() - start, result)
