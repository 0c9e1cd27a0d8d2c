"""How far a model's outputs are from the float model's, gathered while a task metric runs both."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from zoo import Feeds, Run


@dataclass
class Fidelity:
    """Runs two models on every input it is given and hands on the second one's outputs.

    A task's ``evaluate`` takes a function that runs a model; giving it this one measures the outputs on exactly the
    samples of the metric.

    Attributes:
        reference: The float model.
        candidate: The model that is judged.
    """

    reference: Run
    candidate: Run
    _signal: float = 0.0
    _noise: float = 0.0
    _cosines: list[np.ndarray] = field(default_factory=list)
    _agreements: list[np.ndarray] = field(default_factory=list)

    def __call__(self, feeds: Feeds) -> Feeds:
        """Return the candidate's outputs."""
        expected, outputs = self.reference(feeds), self.candidate(feeds)
        self._add(next(iter(expected.values())), next(iter(outputs.values())))
        return outputs

    def _add(self, expected: np.ndarray, got: np.ndarray) -> None:
        a, b = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in (expected, got))
        self._signal += float((a * a).sum())
        self._noise += float(((a - b) ** 2).sum())
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        self._cosines.append((a * b).sum(1) / np.maximum(norms, 1e-30))
        self._agreements.append(a.argmax(1) == b.argmax(1))

    def summary(self) -> dict[str, float]:
        """Return SQNR (dB) of the first output, mean and least cosine of its rows, and the share of equal argmax."""
        cosines = np.concatenate(self._cosines)
        sqnr = 10 * np.log10(self._signal / self._noise) if self._noise else float("inf")
        return {
            "sqnr_db": float(sqnr),
            "cosine": float(cosines.mean()),
            "least_cosine": float(cosines.min()),
            "agreement": float(np.concatenate(self._agreements).mean()),
        }
