"""Move the difficulty of quantizing an input's channels into the weights (SmoothQuant)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.rounding.product_error import ProductError
from bitwright.passes.contract import PassResult
from bitwright.passes.linear_inputs import (
    LinearInput,
    insert_scale,
    linear_inputs,
    migrate_moments,
    rewrite_weights,
)
from bitwright.passes.rewriting import fresh_names
from bitwright.passes.scale_folding import Fold, apply_fold, find_fold

ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SMALLEST = 1e-5  # of a channel's magnitude: one that is always zero must not get an infinite weight
FEWEST_ROWS = 16


@dataclass(frozen=True)
class SmoothScales:
    """Divide the channels of linear layers' inputs by ``s`` and multiply their weights' rows by it.

    ``(X diag(s)^-1) (diag(s) W) = X W`` with ``s_j = max|X_j|^a / max|W_j|^(1-a)`` (Xiao et al. 2023,
    SmoothQuant, section 4, equations 3 and 4), divided by its geometric mean. Where the paper has one alpha for
    a model, each input gets its own, by the error ``||Q(X/s) Q(sW) - X W||^2`` of sampled rows. It is
    cross-validated: an alpha that fits the seen maxima so tightly that the next text is clipped loses. All
    layers that read one value share ``s``.

    ``1/s`` is folded into what computes the value (see :mod:`bitwright.passes.scale_folding`). Where something
    else reads the value, too (the residual of a post-norm encoder), or it does not fold (behind a Gelu), one
    Mul in front of the layers does it, if ``explicit`` allows and the error falls enough to pay for it.

    Attributes:
        moments: By node name. Kept in step: rewritten layers' entries are replaced by those of their new
            inputs.
        alphas: Exponents to try.
        gain: Share of the predicted error that must go where ``1/s`` folds.
        explicit_gain: The same where it takes a Mul; 1 forbids it.
        levels: Grid points of the activations.
        largest: Largest integer of the weights.
    """

    name: ClassVar[str] = "smooth_scales"

    moments: MutableMapping[str, InputMoments] = field(repr=False)
    alphas: tuple[float, ...] = ALPHAS
    gain: float = 0.6
    explicit_gain: float = 0.6
    levels: int = 256
    largest: int = 127

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        names, notes, changed = fresh_names(model), [], 0
        for found in linear_inputs(model, self.moments, self.name):
            done, note = self._smooth(found, names)
            changed += done
            notes.append(f"{found.label}: {note}")
        return PassResult(model, changed, tuple(notes))

    def _smooth(self, found: LinearInput, names: FreshNames) -> tuple[bool, str]:
        if len(found.moments.rows) < FEWEST_ROWS:
            return False, f"only {len(found.moments.rows)} rows were seen"
        fold = find_fold(found.value, found.readers, found.channels)
        least = self.gain if fold.sites else self.explicit_gain
        if least >= 1.0:
            return False, f"does not fold: {fold.why_not}"
        alpha, ratio = self._best_alpha(found, fold)
        if alpha is None or ratio > 1.0 - least:
            return False, f"left as it is, the error would fall to {ratio:.2f} only"
        scale = smoothing_scale(found.moments.largest[0], found.weight, alpha, fold.groups)
        rewrite_weights(found, None, scale, names)
        if fold.sites:
            apply_fold(fold, 1.0 / scale, names)
        else:
            insert_scale(found, 1.0 / scale, names)
        migrate_moments(self.moments, found, None, scale)
        where = "folded" if fold.sites else f"by a Mul ({fold.why_not})"
        return True, f"alpha {alpha:g}, predicted error {ratio:.2f} of before, {where}"

    def _best_alpha(self, found: LinearInput, fold: Fold) -> tuple[float | None, float]:
        """Return the best alpha and its error in terms of the error without smoothing."""
        weight = found.weight
        error = ProductError(found.moments.rows[:, 0], weight, self.levels, self.largest)
        one = np.ones(found.channels, np.float32)
        before = error.of(lambda _: (None, one))
        known: dict[float, float] = {}

        def after(alpha: float) -> float:
            if alpha not in known:
                known[alpha] = error.of(
                    lambda rows: (
                        None,
                        smoothing_scale(np.abs(rows).max(axis=0), weight, alpha, fold.groups).astype(
                            np.float32
                        ),
                    )
                )
            return known[alpha]

        # Every other alpha, then the best one's neighbours: the error has one valley.
        middle = min(range(1, len(self.alphas), 2), key=lambda k: after(self.alphas[k]), default=0)
        best = min(self.alphas[max(middle - 1, 0) : middle + 2], key=after, default=None)
        if best is None or before == 0 or after(best) >= before:
            return None, 1.0
        return best, after(best) / before


def smoothing_scale(
    largest: NDArray[np.float32], weight: NDArray[np.float32], alpha: float, groups: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return ``s`` of SmoothQuant, float64 [K], of geometric mean 1 and equal within groups.

    Args:
        largest: Largest magnitude of each input channel, [K].
        weight: [K, N].
        alpha: 0 evens out the weights, 1 the inputs.
        groups: int64 [K], channels of one number share one factor.
    """
    inputs = _by_group(largest.astype(np.float64), groups)
    weights = _by_group(np.abs(weight).max(axis=1, initial=0.0).astype(np.float64), groups)
    logs = alpha * np.log(np.maximum(inputs, SMALLEST)) - (1 - alpha) * np.log(np.maximum(weights, SMALLEST))
    scale: NDArray[np.float64] = np.maximum(np.exp(logs - logs.mean()), SMALLEST)
    return scale


def _by_group(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    most: NDArray[np.float64] = np.zeros(int(groups.max(initial=0)) + 1)
    np.maximum.at(most, groups, values)
    spread: NDArray[np.float64] = most[groups]
    return spread
