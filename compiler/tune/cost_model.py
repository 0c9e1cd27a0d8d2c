"""A small model of a kernel's time: regression stumps added one after the other, retrained after every batch.

It sees a few dozen measurements of one workload, so it must not be clever: a stump asks one question of one
parameter (or of the product of two), and a hundred of them, each taken at a tenth, make a smooth guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from bitwright.targets.backend import KernelChoice

STUMPS = 120
SHARE = 0.15
# A question that separates fewer measurements learns noise.
MIN_SIDE = 2


def features_of(choices: Sequence[KernelChoice]) -> np.ndarray:
    """Return what the model sees of candidates: float64 [candidates, features].

    These are the place in the template's own cost order, the template and instruction, the logarithm of every
    parameter, and of the product of every two: the size of a tile is what registers and caches are full of.

    Args:
        choices: All candidates of a workload, in the template's cost order.
    """
    names = sorted({name for choice in choices for name, _ in choice.params})
    kinds = sorted({(choice.template, choice.intrinsic) for choice in choices})
    rows = []
    for rank, choice in enumerate(choices):
        values = dict(choice.params)
        logs = [float(np.log2(1 + max(0, values.get(name, 0)))) for name in names]
        products = [a + b for a, b in combinations(logs, 2)]
        kind = [float((choice.template, choice.intrinsic) == k) for k in kinds]
        rows.append([float(np.log2(1 + rank)), *kind, *logs, *products])
    return np.asarray(rows)


@dataclass(frozen=True)
class _Stump:
    feature: int
    threshold: float
    below: float
    above: float

    def apply(self, features: np.ndarray) -> np.ndarray:
        return np.where(features[:, self.feature] <= self.threshold, self.below, self.above)


class CostModel:
    """Predicts the logarithm of a kernel's time over the default's.

    Args:
        features: Of the measured candidates, from :func:`features_of`.
        ratios: Their times over the default's.
    """

    def __init__(self, features: np.ndarray, ratios: Sequence[float]) -> None:
        target = np.log(np.asarray(ratios, np.float64))
        self._mean = float(target.mean())
        self._stumps: list[_Stump] = []
        rest = target - self._mean
        splits = _splits(features)
        for _ in range(STUMPS):
            stump = _best_stump(features, rest, splits)
            if stump is None:
                break
            self._stumps.append(stump)
            rest = rest - stump.apply(features)
        self.error = float(np.sqrt(np.mean(rest**2)))

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the expected ratios of candidates."""
        total = np.full(len(features), self._mean)
        for stump in self._stumps:
            total += stump.apply(features)
        found: np.ndarray = np.exp(total)
        return found


def _splits(features: np.ndarray) -> list[tuple[int, float, np.ndarray]]:
    """Return every question that has enough measurements on both sides."""
    found = []
    for feature in range(features.shape[1]):
        values = np.unique(features[:, feature])
        for low, high in pairwise(values):
            threshold = (low + high) / 2
            below = features[:, feature] <= threshold
            if MIN_SIDE <= below.sum() <= len(below) - MIN_SIDE:
                found.append((feature, float(threshold), below))
    return found


def _best_stump(
    features: np.ndarray, rest: np.ndarray, splits: Sequence[tuple[int, float, np.ndarray]]
) -> _Stump | None:
    if not splits:
        return None
    masks = np.asarray([below for _, _, below in splits], np.float64)
    counts = masks.sum(axis=1)
    below = masks @ rest
    above = rest.sum() - below
    gains = below**2 / counts + above**2 / (len(rest) - counts)
    best = int(np.argmax(gains))
    if gains[best] <= 1e-12:
        return None
    feature, threshold, _ = splits[best]
    return _Stump(
        feature,
        threshold,
        SHARE * below[best] / counts[best],
        SHARE * above[best] / (len(rest) - counts[best]),
    )
