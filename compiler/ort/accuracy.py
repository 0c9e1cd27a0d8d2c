"""The user's own metric on two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.ort.session import SessionConfig, callable_model, open_session

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Metric = Callable[[Run], float]


@dataclass(frozen=True)
class Accuracy:
    """The metric before and after; higher is better.

    Attributes:
        float_value: Of the float model.
        quantized_value: Of the quantized model.
        kind: ``"perplexity"``: the values are minus the perplexity; empty: the user's own metric.
    """

    float_value: float
    quantized_value: float
    kind: str = ""

    @property
    def drop(self) -> float:
        """Relative loss: 0.01 means one percent of the float value is gone."""
        return (self.float_value - self.quantized_value) / abs(self.float_value) if self.float_value else 0.0


def measure(metric: Metric, float_model: ir.Model, quantized: ir.Model, config: SessionConfig) -> Accuracy:
    """Evaluate the metric with ONNX Runtime running each model."""
    before, after = (metric(callable_model(open_session(m, config))) for m in (float_model, quantized))
    return Accuracy(before, after)
