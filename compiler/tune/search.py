"""Which candidates of one workload to measure next, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from bitwright.compiler.tune.cost_model import CostModel, features_of
from bitwright.targets.backend import KernelChoice

BATCH = 8
# With fewer measurements the template's own order is the better guess.
ENOUGH = 8
EXPLORED = 0.125
# A batch that improves the best by less has improved nothing: repeated timings differ by as much.
GAIN = 0.01
# So many batches without a gain, and a model that expects none, end a search.
PATIENCE = 2


class Search:
    """The search over one workload's candidates.

    Args:
        candidates: In the template's cost order, the default first.
        known: Ratios to the default that were measured before, infinite where a candidate does not work.
        seed: For the exploration; equal histories propose equal candidates.
    """

    def __init__(
        self,
        candidates: Sequence[KernelChoice],
        known: Mapping[KernelChoice, float] | None = None,
        seed: int = 0,
    ) -> None:
        self.candidates = tuple(candidates)
        self.measured: dict[KernelChoice, float] = {self.candidates[0]: 1.0}
        self._features = features_of(self.candidates)
        self._place = {choice: k for k, choice in enumerate(self.candidates)}
        self._random = np.random.default_rng(seed)
        self._stale = 0
        for choice, ratio in (known or {}).items():
            if choice in self._place:
                self.measured.setdefault(choice, ratio)

    @property
    def best(self) -> tuple[KernelChoice, float]:
        """The fastest candidate so far and its ratio to the default."""
        return min(self.measured.items(), key=lambda item: item[1])

    @property
    def left(self) -> list[KernelChoice]:
        """What has not been measured, in cost order."""
        return [choice for choice in self.candidates if choice not in self.measured]

    def leaders(self, count: int) -> list[KernelChoice]:
        """Return the fastest candidates that are no slower than the default, best first."""
        good = [choice for choice, ratio in self.measured.items() if ratio <= 1.0]
        return sorted(good, key=lambda choice: self.measured[choice])[:count]

    def propose(self, count: int = BATCH) -> list[KernelChoice]:
        """Return what to measure next: the template's favourites first, later those that the model expects most of.

        One of a batch is drawn at random, so that what the model is wrong about is found out.
        """
        left = self.left
        model = self._model()
        if model is None or len(left) <= count:
            return left[:count]
        _, hoped = model.predict(self._features[[self._place[c] for c in left]])
        order = [left[k] for k in np.argsort(hoped, kind="stable")]
        drawn = round(EXPLORED * count)
        chosen, rest = order[: count - drawn], order[count - drawn :]
        picks = self._random.choice(len(rest), size=min(drawn, len(rest)), replace=False)
        return [*chosen, *(rest[int(k)] for k in sorted(picks))]

    def observe(self, ratios: Mapping[KernelChoice, float]) -> None:
        """Learn what a batch measured."""
        before = self.best[1]
        self.measured.update(ratios)
        self._stale = 0 if self.best[1] < before * (1 - GAIN) else self._stale + 1

    def finished(self) -> bool:
        """Tell whether nothing is left, or nothing more is expected."""
        left = self.left
        if not left:
            return True
        model = self._model()
        if model is None or self._stale < PATIENCE:
            return False
        expected, _ = model.predict(self._features[[self._place[c] for c in left]])
        return float(expected.min()) > self.best[1] * (1 - GAIN) or self._stale >= 2 * PATIENCE

    def _model(self) -> CostModel | None:
        good = {c: r for c, r in self.measured.items() if math.isfinite(r)}
        if len(good) < ENOUGH:
            return None
        return CostModel(self._features[[self._place[c] for c in good]], list(good.values()))
