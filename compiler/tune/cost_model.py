"""A model of a kernel's time: a Gaussian process over the parameters, retrained after every batch.

It sees a few dozen measurements of one workload. Besides a guess it says how unsure it is, and that is what makes
it better than chance on so few: a search that trusts guesses alone measures the neighbours of what it knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bitwright.targets.backend import KernelChoice

# Distance at which candidates say little about each other, as a share of the spread of all of them.
REACH = 0.5
# Share of the spread of the times that is noise of measuring.
NOISE = 0.05


def features_of(choices: Sequence[KernelChoice]) -> np.ndarray:
    """Return what the model sees of candidates: float64 [candidates, features], every column of like spread.

    These are the place in the template's own cost order, the template and instruction, and the logarithm of
    every parameter: twice as large is a step of one, wherever it begins.

    Args:
        choices: All candidates of a workload, in the template's cost order.
    """
    names = sorted({name for choice in choices for name, _ in choice.params})
    kinds = sorted({(choice.template, choice.intrinsic) for choice in choices})
    rows = []
    for rank, choice in enumerate(choices):
        values = dict(choice.params)
        logs = [float(np.log2(1 + max(0, values.get(name, 0)))) for name in names]
        kind = [float((choice.template, choice.intrinsic) == k) for k in kinds]
        rows.append([float(np.log2(1 + rank)), *kind, *logs])
    found = np.asarray(rows)
    scaled: np.ndarray = found / (np.maximum(found.std(axis=0), 0.1) * np.sqrt(found.shape[1]))
    return scaled


class CostModel:
    """Predicts the logarithm of a kernel's time over the default's.

    Args:
        features: Of the measured candidates, from :func:`features_of`.
        ratios: Their times over the default's.
    """

    def __init__(self, features: np.ndarray, ratios: Sequence[float] | np.ndarray) -> None:
        target = np.log(np.asarray(ratios, np.float64))
        self._features = features
        self._mean, self._spread = float(target.mean()), max(float(target.std()), 1e-3)
        kernel = _likeness(features, features) + NOISE * np.eye(len(features))
        self._factor = np.linalg.cholesky(kernel)
        self._weights = self._solve((target - self._mean) / self._spread)

    def _solve(self, right: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.linalg.solve(self._factor.T, np.linalg.solve(self._factor, right))
        return found

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected ratios of candidates, and the least that would be no surprise (one deviation)."""
        likeness = _likeness(features, self._features)
        guess = likeness @ self._weights
        known = np.linalg.solve(self._factor, likeness.T)
        unsure = np.sqrt(np.maximum(0.0, 1.0 - (known**2).sum(axis=0)))
        return (
            np.exp(self._mean + self._spread * guess),
            np.exp(self._mean + self._spread * (guess - unsure)),
        )


def _likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    distance = ((one[:, None] - other[None]) ** 2).sum(axis=-1)
    found: np.ndarray = np.exp(-0.5 * distance / REACH**2)
    return found
