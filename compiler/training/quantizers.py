"""The plan's quantizers as modules with learned scales, and what they have learned, for the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.compiler.errors import UsageError
from bitwright.compiler.plan.model import ActivationQuant, WeightQuant
from bitwright.compiler.training.fake_quantization import (
    SMALLEST_SCALE,
    few_values,
    learned_sign,
    learned_step,
    straight_through,
)
from bitwright.passes.stored_weights import FLOAT_TYPES, integer_range, is_indexed

Scaling = Literal["learned", "mean"]
FEW_VALUES = ("ternary", "binary")


class ActivationQuantizer(nn.Module):
    """One scale for a tensor; the zero point stays where calibration put it.

    Args:
        quant: The plan's entry; gives scale and zero point.
        low: Smallest integer.
        high: Largest integer.
    """

    def __init__(self, quant: ActivationQuant, low: int, high: int) -> None:
        super().__init__()
        self.quant = quant
        self.low, self.high = low - quant.zero_point, high - quant.zero_point
        # The logarithm is what is trained: a scale stays positive, and a step changes it by a share of itself.
        self.log_scale = nn.Parameter(torch.tensor(quant.scale, dtype=torch.float32).log())

    def scale(self) -> Tensor:
        """Return the scale, float32, shape ()."""
        return self.log_scale.exp().clamp_min(SMALLEST_SCALE)

    def forward(self, value: Tensor) -> Tensor:
        """Round ``value`` to the grid."""
        shared = max(1, value.numel() // max(1, value.shape[0]) if value.dim() else 1)
        return learned_step(value, self.scale(), float(self.low), float(self.high), shared)

    def learned(self) -> ActivationQuant:
        """Return the plan's entry with the learned scale and the range it covers."""
        scale = float(self.scale().detach())
        return replace(
            self.quant, scale=scale, low=self.low * scale, high=self.high * scale, method="trained"
        )


class WeightQuantizer(nn.Module):
    """Scales for a weight: one, one a channel, or one for each group; zero points stay.

    Args:
        quant: The plan's entry.
        shape: The weight's shape as its reader sees it.
        scaling: Of two or three values: ``learned``, or ``mean``, the mean magnitude of what shares the scale.

    Raises:
        UsageError: The format has no grid that can be trained.
    """

    def __init__(self, quant: WeightQuant, shape: tuple[int, ...], scaling: Scaling) -> None:
        super().__init__()
        if is_indexed(quant) or quant.dtype.startswith("float8"):
            what = f"weights in {quant.codebook or quant.dtype} cannot be trained"
            raise UsageError(what, where="--recipe", fix="train integers, ternary or binary weights")
        self.quant, self.shape, self.scaling = quant, shape, scaling
        self.half = quant.dtype in FLOAT_TYPES
        self.few = quant.codebook in FEW_VALUES
        self.low, self.high = integer_range(quant)
        zero = _zero_point(quant)
        self.register_buffer("zero", None if zero is None else torch.from_numpy(zero), persistent=False)
        scale = torch.from_numpy(np.array(quant.scale, np.float32))
        learns = not self.half and not (self.few and scaling == "mean")
        self.log_scale = nn.Parameter(scale.log(), requires_grad=learns)

    def scale(self, weight: Tensor) -> Tensor:
        """Return the scales in the plan's shape, float32."""
        if self.few and self.scaling == "mean":
            return _mean_magnitude(weight.detach(), self.quant).clamp_min(SMALLEST_SCALE)
        return self.log_scale.exp().clamp_min(SMALLEST_SCALE)

    def forward(self, weight: Tensor) -> Tensor:
        """Round a weight of ``shape`` to the grid."""
        if self.half:
            dtype = torch.float16 if self.quant.dtype == "float16" else torch.bfloat16
            return straight_through(weight, weight.detach().to(dtype).float())
        scale = _expanded(self.scale(weight), self.quant, self.shape)
        if self.few and self.scaling == "mean":
            return few_values(weight, scale, zero=self.quant.codebook == "ternary")
        shared = max(1, weight.numel() // max(1, self.log_scale.numel()))
        if self.quant.codebook == "binary":
            return learned_sign(weight, scale, shared)
        return self._integers(weight, scale, shared)

    def _integers(self, weight: Tensor, scale: Tensor, shared: int) -> Tensor:
        if self.zero is None:
            return learned_step(weight, scale, float(self.low), float(self.high), shared)
        zero = _expanded(self.zero, self.quant, self.shape)
        # Clipped to bounds that differ from group to group first; the rounding then clips nothing more.
        bounded = torch.minimum(torch.maximum(weight, (self.low - zero) * scale), (self.high - zero) * scale)
        reach = float(self.high - self.low)
        return learned_step(bounded, scale, -reach - 1, reach + 1, shared)

    def learned(self, weight: Tensor) -> WeightQuant:
        """Return the plan's entry with the learned scales."""
        if self.half:
            return self.quant
        scale = self.scale(weight).detach().numpy().reshape(self.quant.scale.shape)
        return replace(self.quant, scale=scale.astype(np.float32))


def _zero_point(quant: WeightQuant) -> np.ndarray | None:
    if quant.zero_point is not None:
        return np.asarray(quant.zero_point, np.float32)
    if quant.dtype.startswith("uint") and quant.codebook not in FEW_VALUES:
        return np.full(quant.scale.shape, 2.0 ** (quant.bits - 1), np.float32)
    return None


def _expanded(blocks: Tensor, quant: WeightQuant, shape: tuple[int, ...]) -> Tensor:
    """Return scales or zero points in a form that broadcasts to a weight of ``shape``."""
    if quant.group:
        assert quant.axis is not None, "groups are cut along an axis"
        wide = blocks.repeat_interleave(quant.group, dim=quant.axis)
        return wide.narrow(quant.axis, 0, shape[quant.axis])
    over = [1] * len(shape)
    if quant.axis is not None:
        over[quant.axis] = -1
    return blocks.reshape(over)


def _mean_magnitude(weight: Tensor, quant: WeightQuant) -> Tensor:
    """Return the mean of |w| over the weights that share a scale, in the shape of the plan's scales."""
    magnitude = weight.abs()
    if quant.axis is None:
        return magnitude.mean().reshape(quant.scale.shape)
    if not quant.group:
        others = [k for k in range(weight.dim()) if k != quant.axis]
        return magnitude.mean(dim=others)
    length = weight.shape[quant.axis]
    blocks = [
        magnitude.narrow(quant.axis, start, min(quant.group, length - start)).mean(quant.axis)
        for start in range(0, length, quant.group)
    ]
    return torch.stack(blocks, dim=quant.axis)
