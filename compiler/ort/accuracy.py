"""The user's own metric on two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.ort.session import SessionConfig, open_session, run

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Metric = Callable[[Run], float]


@dataclass(frozen=True)
class Accuracy:
    """The metric before and after; higher is better."""

    float_value: float
    quantized_value: float

    @property
    def drop(self) -> float:
        """Relative loss: 0.01 means one percent of the float value is gone."""
        return (self.float_value - self.quantized_value) / abs(self.float_value) if self.float_value else 0.0


def measure(metric: Metric, float_model: ir.Model, quantized: ir.Model, config: SessionConfig) -> Accuracy:
    """Evaluate the metric with ONNX Runtime running each model."""
    values = []
    for model in (float_model, quantized):
        session = open_session(model, config)
        values.append(metric(lambda feeds, session=session: run(session, feeds)))  # type: ignore[misc]
    return Accuracy(*values)
