"""Protect the weights that large inputs meet from coarse rounding (AWQ)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.rounding.grid import Grid, Quantizer, integer_grid
from bitwright.passes.contract import PassResult
from bitwright.passes.linear_inputs import LinearInput, linear_inputs, migrate_moments, rewrite_weights
from bitwright.passes.rewriting import fresh_names
from bitwright.passes.scale_folding import apply_fold, find_fold

POINTS = 20
SMALLEST = 1e-4  # of a channel's mean magnitude, as in the paper's code: dead channels get a finite scale


@dataclass(frozen=True)
class ScaleWeightsAWQ:
    """Multiply the rows of weights by ``s`` before they are rounded, and divide the inputs by it.

    ``s_j = mean|X_j|^r``, ``r`` the best of 20 points in [0, 1) by ``||X diag(s)^-1 Q(diag(s) W) - X W||^2``
    (Lin et al. 2024, AWQ, section 3.2, equations 4 and 5), divided by ``sqrt(max s * min s)``. For formats that
    round weights only: inputs are exact, so nothing is clipped.

    Only where ``1/s`` folds (see :mod:`bitwright.passes.scale_folding`): a weight-only layer is bound by
    reading its weights, and a Mul in front of it would cost more than GPTQ, which gains as much. The paper's
    second search, for clipped ranges (its section 3.2, last paragraph), is that of
    :func:`bitwright.compiler.rounding.scale_search.search_scales` and happens when scales are chosen.

    Attributes:
        moments: By node name. Kept in step: rewritten layers' entries are replaced by those of their new
            inputs.
        grid: What the weights will be rounded to.
        group: Rows that share a scale; 0 for whole columns.
        gain: Share of the error that must go.
    """

    name: ClassVar[str] = "scale_weights_awq"

    moments: MutableMapping[str, InputMoments] = field(repr=False)
    grid: Grid = field(default_factory=lambda: integer_grid(4))
    group: int = 32
    gain: float = 0.05

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        names, notes, changed = fresh_names(model), [], 0
        for found in linear_inputs(model, self.moments, self.name):
            done, note = self._scale(found, names)
            changed += done
            notes.append(f"{found.label}: {note}")
        return PassResult(model, changed, tuple(notes))

    def _scale(self, found: LinearInput, names: FreshNames) -> tuple[bool, str]:
        fold = find_fold(found.value, found.readers, found.channels)
        if not fold.sites:
            return False, f"does not fold: {fold.why_not}"
        weight, rows = found.weight, found.moments.rows[:, 0]
        mean = _mean_by_group(np.abs(rows).mean(axis=0, dtype=np.float64), fold.groups)
        scales = [awq_scale(mean, k / POINTS) for k in range(POINTS)]
        errors = [self._error(rows, weight, scale) for scale in scales]  # the first is that without scales
        best = int(np.argmin(errors))
        if errors[0] == 0 or errors[best] > (1 - self.gain) * errors[0]:
            return False, "left as it is, no scale lowers the error"
        rewrite_weights(found, None, scales[best], names)
        apply_fold(fold, 1.0 / scales[best], names)
        migrate_moments(self.moments, found, None, scales[best])
        return True, f"r = {best / POINTS:g}, predicted error {errors[best] / errors[0]:.2f} of before"

    def _error(
        self, rows: NDArray[np.float32], weight: NDArray[np.float32], scale: NDArray[np.float64]
    ) -> float:
        factor = scale.astype(np.float32)[:, None]
        residual = self._rounded(weight * factor) / factor - weight
        noise = rows @ residual
        return float(np.vdot(noise, noise))

    def _rounded(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the nearest values of max-abs scales, [K, N]."""
        depth, columns = weight.shape
        group = self.group or depth
        blocks = -(-depth // group)
        padded = np.zeros((blocks * group, columns), np.float32)
        padded[:depth] = np.abs(weight)
        scale = padded.reshape(1, blocks, group, columns).max(axis=2) / np.float32(self.grid.reach)
        scale[scale == 0] = 1.0
        quantizer = Quantizer(self.grid, scale, group=self.group)
        rounded: NDArray[np.float32] = quantizer.dequantize(quantizer.nearest(weight[None]))[0]
        return rounded


def awq_scale(mean: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """Return ``mean^exponent`` divided by the geometric mean of its extremes, float64 [K]."""
    scale = np.maximum(mean, SMALLEST) ** exponent
    normalized: NDArray[np.float64] = scale / np.sqrt(scale.max() * scale.min())
    return normalized


def _mean_by_group(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    means: NDArray[np.float64] = np.bincount(groups, values) / np.bincount(groups)
    spread: NDArray[np.float64] = means[groups]
    return spread
