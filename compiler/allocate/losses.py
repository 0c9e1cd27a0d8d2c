"""How far quantized outputs are from the float model's, as one number that is 0 for equal outputs."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from scipy.special import log_softmax

LossKind = Literal["sqnr", "cosine", "kl", "eval"]
LOSS_KINDS: tuple[LossKind, ...] = get_args(LossKind)


class LossMeter:
    """Accumulates the loss of a model's outputs over samples, in float64.

    - ``sqnr``: energy of the error over energy of the signal, ``10 ** (-SQNR / 10)``.
    - ``cosine``: ``1 - cos`` of the flattened output, mean over samples; computed as half the squared distance of
      the unit vectors, which keeps the digits that the subtraction would lose.
    - ``kl``: Kullback-Leibler divergence of the softmax over the last axis, mean over rows, in nats.

    Several outputs count alike (the mean of their losses). An output of integers or booleans has the share of
    differing elements as its loss. Elements that are not finite in the float model (a mask's minus infinity) are left
    out if they are equal.
    """

    def __init__(self, kind: LossKind) -> None:
        self._kind = kind
        self._sums: dict[str, tuple[float, float]] = {}
        self.fault = ""

    def add(self, name: str, exact: np.ndarray, actual: np.ndarray) -> None:
        """Account for one output of one sample; a fault is kept in ``fault`` and makes the loss infinite."""
        if exact.shape != actual.shape:
            self.fault = f"the shape of output '{name}' changes from {exact.shape} to {actual.shape}"
            return
        if exact.dtype.kind != "f":
            self._count(name, float(np.count_nonzero(exact != actual)), exact.size)
            return
        a, b = exact.astype(np.float64), actual.astype(np.float64)
        hidden = ~np.isfinite(a)
        if not np.array_equal(a[hidden], b[hidden], equal_nan=True) or not np.isfinite(b[~hidden]).all():
            self.fault = f"output '{name}' is not finite"
            return
        self._add_floats(name, a, b, hidden)

    def _add_floats(self, name: str, a: np.ndarray, b: np.ndarray, hidden: np.ndarray) -> None:
        if self._kind == "kl":
            self._count(name, *_divergence(np.where(hidden, -np.inf, a), np.where(hidden, -np.inf, b)))
            return
        a, b = np.where(hidden, 0.0, a), np.where(hidden, 0.0, b)
        if self._kind == "cosine":
            self._count(name, _one_minus_cosine(a.ravel(), b.ravel()), 1)
        else:
            self._count(name, float(np.sum((a - b) ** 2)), float(np.sum(a * a)))

    def _count(self, name: str, above: float, below: float) -> None:
        known = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (known[0] + above, known[1] + below)

    def value(self) -> float:
        """Return the loss; infinite if any output could not be compared."""
        if self.fault:
            return math.inf
        ratios = [
            above / below if below else (math.inf if above else 0.0) for above, below in self._sums.values()
        ]
        return math.fsum(ratios) / len(ratios) if ratios else 0.0


def _one_minus_cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if 0.0 in lengths:
        return 0.0 if lengths == (0.0, 0.0) else 1.0
    return 0.5 * float(np.sum((a / lengths[0] - b / lengths[1]) ** 2))


def _divergence(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the sum of the divergences of all rows, and their number."""
    if not a.size:
        return 0.0, 0.0
    a, b = (np.atleast_1d(v).reshape(-1, np.atleast_1d(v).shape[-1]) for v in (a, b))
    seen = np.isfinite(a).any(axis=1)
    p, q = log_softmax(a[seen], axis=1), log_softmax(b[seen], axis=1)
    present = np.isfinite(p)
    terms = np.exp(p[present]) * (p[present] - q[present])
    # The exact divergence is not negative; its sum may be, by rounding.
    return max(0.0, float(np.sum(terms))), float(np.count_nonzero(seen))
