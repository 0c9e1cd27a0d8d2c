"""Predicted noise of 8-bit rounding around a group of values, by one factor a channel, and its minimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

# Maxima are smoothed to the p-norm with p = 2^5 while searching: close to the maximum, yet every large channel has a
# gradient, and the power is five squarings.
SQUARINGS = 5
STEPS = 100
FIRST_STEP = 0.1  # of a factor's logarithm
# Equalize ranges not at all, half, fully: the search starts there, because the noise has several local minima.
STARTS = (0.0, 0.5, 1.0)
# Factors of a layer differ by no more than this: beyond it float32 products would lose small channels.
LARGEST_RATIO = 2.0**16


@dataclass(frozen=True, eq=False)
class RoundedTensor:
    """An activation with one 8-bit scale for all channels.

    Attributes:
        low: Lower end of each channel, <= 0, shape (C,).
        high: Upper end, >= 0.
        gain: Noise power at the model's outputs for unit noise power in each channel.
    """

    low: Float64
    high: Float64
    gain: Float64


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """The weight of a layer that reads the group, one scale for each output channel.

    Attributes:
        magnitude: Largest magnitude over the taps of a kernel, shape (G, O, C / G).
        taps: Weights of one kernel.
        gain: Noise power at the model's outputs for unit noise power in each output channel, shape (G, O).
        power: Mean square of each channel of the data, shape (C,).
    """

    magnitude: Float64
    taps: int
    gain: Float64
    power: Float64


@dataclass(frozen=True, eq=False)
class GroupNoise:
    """Predicted noise power of a group whose channels are multiplied by ``s``.

    A tensor's step is ``d = range / levels``; rounding adds ``d^2 / 12`` to every channel, which counts ``1 / s^2``
    once the readers have taken the factor back. A weight's step is ``max_c |W_oc / s_c| / largest`` for output
    channel o, and its rounding noise meets data of power ``s^2 E[x^2]``. The weights that write the group have a scale
    for each of its channels, so a factor does not change their noise.

    Attributes:
        tensors: Rounded activations of the group.
        weights: Rounded weights that read it.
        levels: Steps of an activation's range.
        largest: Largest integer of a weight.
    """

    tensors: Sequence[RoundedTensor]
    weights: Sequence[RoundedWeight]
    levels: int = 255
    largest: int = 127

    def exact(self, scale: Float64) -> float:
        """Return the noise power for factors of shape (C,)."""
        return self._noise(scale, smooth=False)[0]

    def smooth(self, logarithm: Float64) -> tuple[float, Float64]:
        """Return an upper bound close to the noise power, and its gradient, at ``s = exp(logarithm)``."""
        return self._noise(np.exp(logarithm), smooth=True)

    def _noise(self, scale: Float64, smooth: bool) -> tuple[float, Float64]:
        total, gradient = 0.0, np.zeros_like(scale)
        for tensor in self.tensors:
            value, slope = self._tensor(tensor, scale, smooth)
            total, gradient = total + value, gradient + slope
        for weight in self.weights:
            value, slope = self._weight(weight, scale, smooth)
            total, gradient = total + value, gradient + slope
        return total, gradient

    def _tensor(self, tensor: RoundedTensor, scale: Float64, smooth: bool) -> tuple[float, Float64]:
        high, high_share = _largest(tensor.high * scale, smooth)
        low, low_share = _largest(-tensor.low * scale, smooth)
        step = (high + low) / self.levels
        slope = (high * high_share + low * low_share) / self.levels  # d step / d log s
        effect = tensor.gain / scale**2
        value = step**2 / 12 * effect.sum()
        return float(value), 2 * step * slope / 12 * effect.sum() - 2 * step**2 / 12 * effect

    def _weight(self, weight: RoundedWeight, scale: Float64, smooth: bool) -> tuple[float, Float64]:
        groups = len(weight.magnitude)
        power = (scale**2 * weight.power).reshape(groups, 1, -1)
        bound, share = _largest(weight.magnitude / scale.reshape(groups, 1, -1), smooth)
        factor = weight.taps * weight.gain * (bound[..., 0] / self.largest) ** 2 / 12  # (G, O)
        met = power.sum(axis=2)  # (G, 1)
        slope = 2 * factor.sum(axis=1)[:, None] * power[:, 0] - 2 * np.einsum(
            "go,goc->gc", factor * met, share
        )
        return float((factor * met).sum()), slope.reshape(-1)


def _largest(values: Float64, smooth: bool) -> tuple[Float64, Float64]:
    """Return the (smooth) maximum of the positive parts along the last axis, and what each adds to its slope."""
    positive = np.maximum(values, 0.0)
    top = positive.max(axis=-1, keepdims=True, initial=0.0)
    if not smooth:
        return (top if values.ndim > 1 else top[0]), np.zeros_like(values)
    relative = positive / np.where(top > 0, top, 1.0)
    for _ in range(SQUARINGS):
        relative *= relative
    total = relative.sum(axis=-1, keepdims=True)
    found, share = top * total**0.5**SQUARINGS, relative / np.where(total > 0, total, 1.0)
    return (found if values.ndim > 1 else found[0]), share


def best_scale(noise: GroupNoise) -> tuple[Float64, float]:
    """Return the factors of least predicted noise, and by how many decibels it falls.

    Channels that are always zero keep the factor 1. The others have geometric mean 1.

    Returns:
        Factors, float64 of shape (C,), positive and finite; and the gain in dB, >= 0 (0 for factors of 1).
    """
    reach: Float64 = np.max([np.maximum(t.high, -t.low) for t in noise.tensors], axis=0)
    alive = (reach > 0) & np.isfinite(reach)
    ones = np.ones_like(reach)
    before = noise.exact(ones)
    if not alive.any() or not np.isfinite(before) or before <= 0.0:
        return ones, 0.0
    best, least = ones, before
    for start in STARTS:
        scale = _search(noise, np.where(alive, -start * np.log(np.where(alive, reach, 1.0)), 0.0), alive)
        found = noise.exact(scale)
        if found < least:
            best, least = scale, found
    return best, float(10 * np.log10(before / least))


def _search(noise: GroupNoise, start: Float64, alive: NDArray[np.bool_]) -> Float64:
    """Descend by resilient propagation (Riedmiller and Braun 1993): only signs of the gradient count.

    Factors differ by orders of magnitude in their effect, which sign steps do not mind, and there is no linear algebra
    whose threads would take longer to start than these few numbers to compute.
    """
    limit = np.log(LARGEST_RATIO) / 2
    place = np.clip(np.where(alive, start - start[alive].mean(), 0.0), -limit, limit)
    step, before = np.full_like(place, FIRST_STEP), np.zeros_like(place)
    best, least = place, np.inf
    for _ in range(STEPS):
        value, gradient = noise.smooth(place)
        if value < least:
            best, least = place, value
        turned = gradient * before < 0
        step = np.clip(
            np.where(turned, step * 0.5, np.where(gradient * before > 0, step * 1.2, step)), 0.0, 1.0
        )
        before = np.where(turned, 0.0, gradient)
        place = np.clip(place - np.where(alive, np.sign(before) * step, 0.0), -limit, limit)
    scale: Float64 = np.exp(np.where(alive, best - best[alive].mean(), 0.0))
    return scale
