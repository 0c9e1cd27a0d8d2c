"""Decoders in numpy, as llama.cpp computes llama and qwen3 from GGUF's tensors: what recognition is proven against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.llama.decoder import HyperParameters

Float32 = NDArray[np.float32]
Weights = Callable[[str], Float32 | None]


def logits(tokens: NDArray[np.integer], hyper: HyperParameters, weights: Weights) -> Float32:
    """Compute the logits of a sequence; one tensor is in memory at a time.

    Args:
        tokens: Shape (length,).
        hyper: Sizes and constants.
        weights: Returns a tensor by its GGUF name, or None if there is no such tensor.

    Returns:
        float32, shape (length, vocabulary).
    """
    x = _needed(weights, "token_embd.weight")[tokens]
    for layer in range(hyper.layers):
        stem = f"blk.{layer}."
        window = hyper.windows[layer] if hyper.windows else None
        normed = _norm(x, _needed(weights, f"{stem}attn_norm.weight"), hyper)
        x = x + _attention(normed, hyper, weights, stem, window)
        x = x + _feed_forward(_norm(x, _needed(weights, f"{stem}ffn_norm.weight"), hyper), weights, stem)
    x = _norm(x, _needed(weights, "output_norm.weight"), hyper)
    head = weights("output.weight")
    found: Float32 = x @ (_needed(weights, "token_embd.weight") if head is None else head).T
    return found


def _needed(weights: Weights, name: str) -> Float32:
    found = weights(name)
    if found is None:
        raise KeyError(name)
    return found


def _norm(x: Float32, gains: Float32, hyper: HyperParameters) -> Float32:
    mean = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
    found: Float32 = (x / np.sqrt(mean + hyper.epsilon)).astype(np.float32) * gains
    return found


def _linear(x: Float32, weights: Weights, stem: str) -> Float32:
    product: Float32 = x @ _needed(weights, f"{stem}.weight").T
    bias = weights(f"{stem}.bias")
    return product if bias is None else product + bias


def _rotated(x: Float32, hyper: HyperParameters, factors: Float32 | None) -> Float32:
    """Turn the elements of each head, shape (length, heads, width): llama's neighbours, qwen3's halves."""
    powers = np.arange(0, hyper.head_width, 2) / hyper.head_width
    angles = np.arange(len(x))[:, None] * hyper.base**-powers
    if factors is not None:
        angles = angles / factors
    cos, sin = np.cos(angles)[:, None].astype(np.float32), np.sin(angles)[:, None].astype(np.float32)
    half = hyper.head_width // 2
    first, second = (x[..., :half], x[..., half:]) if hyper.head_norms else (x[..., 0::2], x[..., 1::2])
    turned = [first * cos - second * sin, first * sin + second * cos]
    if hyper.head_norms:
        return np.concatenate(turned, axis=-1)
    return np.stack(turned, axis=-1).reshape(x.shape)


def _attention(
    x: Float32, hyper: HyperParameters, weights: Weights, stem: str, window: int | None
) -> Float32:
    length, width = len(x), hyper.head_width
    q, k, v = (_linear(x, weights, f"{stem}attn_{part}").reshape(length, -1, width) for part in "qkv")
    if hyper.head_norms:
        q, k = (
            _norm(part, _needed(weights, f"{stem}attn_{name}_norm.weight"), hyper)
            for part, name in ((q, "q"), (k, "k"))
        )
    factors = weights("rope_freqs.weight")
    repeat = hyper.heads // hyper.key_heads
    q, k = _rotated(q, hyper, factors), np.repeat(_rotated(k, hyper, factors), repeat, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * np.float32(width**-0.5)
    scores = np.where(_seen(length, window), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    mixed = np.einsum("hqk,khd->qhd", shares, np.repeat(v, repeat, axis=1)).reshape(length, -1)
    return _linear(mixed.astype(np.float32), weights, f"{stem}attn_output")


def _seen(length: int, window: int | None) -> NDArray[np.bool_]:
    """Tell which positions (columns) each position (row) sees: itself, those before it, none beyond its window."""
    seen = np.tri(length, dtype=bool)
    return seen if window is None else seen & ~np.tri(length, k=-window, dtype=bool)


def _feed_forward(x: Float32, weights: Weights, stem: str) -> Float32:
    gate = _linear(x, weights, f"{stem}ffn_gate")
    silu = gate / (1 + np.exp(-gate))
    return _linear(silu * _linear(x, weights, f"{stem}ffn_up"), weights, f"{stem}ffn_down")
