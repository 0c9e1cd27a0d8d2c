"""Test data that needs no file: the same numbers on every machine, from integer arithmetic alone."""

from __future__ import annotations

from math import prod

import numpy as np


def mixed(count: int, seed: int) -> np.ndarray:
    """Return ``count`` well mixed uint32 numbers."""
    with np.errstate(over="ignore"):
        h = np.arange(count, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(seed * 40503 + 1)
        h ^= h >> np.uint32(15)
        h *= np.uint32(2246822519)
        h ^= h >> np.uint32(13)
    return h


def pattern(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Return an array of a pattern: int8 in [-127, 127], or floats in [-1, 1) with 8 bits."""
    top = (mixed(prod(shape), seed) >> np.uint32(24)).astype(np.uint8).view(np.int8)
    if dtype == "int8":
        return np.maximum(top, np.int8(-127)).reshape(shape)
    return (top.astype(np.float32) / 128).astype(dtype).reshape(shape)
