"""From logits to the next token: the most probable one, or one drawn with a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.errors import ModelError, UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Logits are divided by it before drawing; 0 takes the most probable token.
        top_k: Draw from so many of the most probable tokens only; None: from all.
        top_p: Of these draw from the fewest most probable ones whose probabilities reach this sum; None: from all.
        seed: Equal seeds draw equal tokens.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            what = f"{self.temperature} is no temperature"
            raise UsageError(what, where="--temperature", fix="pass 0 (the most probable token) or more")
        if self.top_k is not None and self.top_k < 1:
            what = "at least one token must be left to choose from"
            raise UsageError(what, where="--top-k", fix="pass 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            what = f"{self.top_p} is no share of probability"
            raise UsageError(what, where="--top-p", fix="pass more than 0 and at most 1")
        if self.seed < 0:
            what = f"{self.seed} is no seed"
            raise UsageError(what, where="--seed", fix="pass 0 or more")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            what = "at temperature 0 the most probable token is taken, whatever else is allowed"
            where = "--top-k" if self.top_k is not None else "--top-p"
            raise UsageError(what, where=where, fix="pass a temperature, too, e.g. --temperature 0.8")


class Sampler:
    """Chooses tokens one after the other.

    Args:
        sampling: How.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: NDArray[np.floating]) -> int:
        """Return the next token.

        Args:
            logits: Shape (vocabulary,); minus infinity forbids a token.

        Raises:
            ModelError: They are not finite.
        """
        check_logits(logits)
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        tokens, probabilities = candidates(logits, self._sampling)
        sums = np.cumsum(probabilities)
        place = np.searchsorted(sums, self._random.random() * sums[-1], side="right")
        return int(tokens[min(int(place), len(tokens) - 1)])


def candidates(
    logits: NDArray[np.floating], sampling: Sampling
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the tokens that may be drawn, the most probable first, and their probabilities.

    Among equal logits the smaller token number comes first. The probabilities are those after the temperature and
    ``top_k``; with ``top_p`` their sum is what is left of 1.

    Args:
        logits: Shape (vocabulary,).
        sampling: With a temperature above 0.
    """
    assert sampling.temperature > 0, "nothing is drawn at temperature 0"
    order = np.argsort(-logits, kind="stable")[: sampling.top_k]
    kept = logits[order].astype(np.float64)
    weights = np.exp((kept - kept[0]) / sampling.temperature)
    probabilities = weights / weights.sum()
    count = int(np.count_nonzero(probabilities))
    if sampling.top_p is not None:
        reached = np.searchsorted(np.cumsum(probabilities), sampling.top_p, side="left")
        count = min(count, int(reached) + 1)
    return order[:count], probabilities[:count]


def check_logits(logits: NDArray[np.floating]) -> None:
    """Refuse logits that no token can be chosen from.

    Raises:
        ModelError: One is NaN or infinite, or all are minus infinity.
    """
    if not np.isfinite(logits.max()):
        token = int(np.flatnonzero(~np.isfinite(logits))[0])
        what = f"the model's logits are not finite: token {token} has {logits[token]}"
        raise ModelError(what, fix="the weights or the number format overflow; check the model in float32")
