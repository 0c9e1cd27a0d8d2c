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
    _rows: list[np.ndarray] = field(default_factory=list)

    def __call__(self, feeds: Feeds) -> Feeds:
        """Return the candidate's outputs."""
        expected, outputs = self.reference(feeds), self.candidate(feeds)
        rows = _compare(next(iter(expected.values())), next(iter(outputs.values())))
        mask = feeds.get("attention_mask")
        padded = np.zeros(len(rows)) if mask is None else ~mask.astype(bool).all(axis=1)
        self._rows.append(np.column_stack([rows, padded]))
        return outputs

    def summary(self) -> dict[str, float]:
        """Return SQNR (dB) of the first output, mean and least cosine of its rows, and the share of equal argmax.

        Texts in a batch are padded to the longest. Nobody calibrated on padding, so texts that were padded are left
        out, and ``cosine_with_padded`` tells what they change.
        """
        every = np.concatenate(self._rows)
        signal, noise, cosine, same, _ = every[every[:, -1] == 0].T
        total = noise.sum()
        return {
            "sqnr_db": float(10 * np.log10(signal.sum() / total)) if total else float("inf"),
            "cosine": float(cosine.mean()),
            "least_cosine": float(cosine.min()),
            "agreement": float(same.mean()),
            "cosine_with_padded": float(every[:, 2].mean()),
        }


def _compare(expected: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Return energy, energy of the difference, cosine and equality of argmax of every row, as [rows, 4]."""
    a, b = (v.reshape(-1, v.shape[-1]).astype(np.float64) for v in (expected, got))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(1) / np.maximum(norms, 1e-30)
    same = a.argmax(1) == b.argmax(1)
    return np.column_stack([(a * a).sum(1), ((a - b) ** 2).sum(1), cosine, same])
