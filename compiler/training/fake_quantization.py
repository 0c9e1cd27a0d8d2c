"""Rounding that gradients pass through.

Learned step sizes (Esser et al. 2020, "Learned Step Size Quantization", section 2.1): a value ``v`` becomes
``q = round(clip(v / s, low, high)) * s``. Gradients pass the rounding as if it were not there, and the scale gets

    dq/ds = round(v / s) - v / s   where low < v / s < high,   low or high where it was clipped,

multiplied by ``1 / sqrt(N * high)`` for the N values that share the scale (section 2.2), so that scales and weights
move at comparable speeds.

Weights of two or three values may instead take the mean of their magnitudes as scale at every step (Ma et al. 2024,
"The Era of 1-bit LLMs", equations 1 to 3); gradients then pass unchanged to all weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-100


class _LearnedStep(torch.autograd.Function):
    """``round(clip(v / s, low, high)) * s`` with the gradients of the module's docstring.

    Passes over the tensor are most of the time of a step, and those that make or read truth values the slowest. So one
    is made in place of another where nobody looks, and the scale's gradient comes of what is kept anyway: it is
    ``sum(g * round(v / s)) - sum(g * v / s where not clipped)``.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, low: float, high: float) -> Tensor:
        rounded = (value / scale).clamp_(low, high).round_().mul_(scale)
        ctx.save_for_backward(value, rounded, scale)
        ctx.bounds = low, high
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        value, rounded, scale = ctx.saved_tensors
        steps = value / scale
        passed = torch.ops.aten.hardtanh_backward(gradient, steps, *ctx.bounds)
        learned = None
        if ctx.needs_input_grad[1]:
            whole, inside = (
                (gradient * rounded).sum_to_size(scale.shape),
                (passed * steps).sum_to_size(scale.shape),
            )
            learned = whole / scale - inside
        return passed, learned, None, None


class _Sign(torch.autograd.Function):
    """``s`` or ``-s`` by the sign of a weight (0 counts as negative), with the gradients of a clipped identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(value, scale)
        return torch.where(value > 0, scale, -scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        value, scale = ctx.saved_tensors
        by_scale = torch.where(value > 0, gradient, -gradient).sum_to_size(scale.shape)
        return gradient * (value.abs() <= scale), by_scale


class _StraightThrough(torch.autograd.Function):
    """Other values in the place of the given ones; gradients as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, replaced: Tensor) -> Tensor:
        return replaced.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _ScaledGradient(torch.autograd.Function):
    """The identity, with gradients multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def learned_step(value: Tensor, scale: Tensor, low: float, high: float, shared: int) -> Tensor:
    """Round to a grid whose scale is learned.

    Args:
        value: float32, any shape.
        scale: float32, positive, of a shape that broadcasts to ``value``'s.
        low: Smallest integer less the zero point, <= 0.
        high: Largest integer less the zero point, >= 0.
        shared: How many values share a scale.
    """
    reach = max(-low, high, 1.0)
    scale = _ScaledGradient.apply(scale, 1.0 / math.sqrt(shared * reach))
    rounded: Tensor = _LearnedStep.apply(value, scale, low, high)
    return rounded


def learned_sign(value: Tensor, scale: Tensor, shared: int) -> Tensor:
    """Round to ``scale`` and ``-scale``, which are learned."""
    scale = _ScaledGradient.apply(scale, 1.0 / math.sqrt(shared))
    signed: Tensor = _Sign.apply(value, scale)
    return signed


def straight_through(value: Tensor, replaced: Tensor) -> Tensor:
    """Return ``replaced`` to whoever reads on, and its gradient to ``value``."""
    passed: Tensor = _StraightThrough.apply(value, replaced)
    return passed


def few_values(value: Tensor, scale: Tensor, *, zero: bool) -> Tensor:
    """Round to {-scale, 0, scale}, or without 0 if ``zero`` is false; gradients pass unchanged."""
    if zero:
        return straight_through(value, (value / scale).round().clamp(-1, 1) * scale)
    return straight_through(value, torch.where(value > 0, scale, -scale))
