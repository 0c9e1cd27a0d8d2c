"""Numerical equality of two forms of one model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from bitwright.compiler.ort.session import SessionConfig, open_session, run


def relative_difference(
    reference: ir.Model, other: ir.Model, feeds: Mapping[str, np.ndarray], *, threads: int = 1
) -> float:
    """Return the largest difference of any output, relative to that output's largest magnitude.

    Integer and boolean outputs count as 0 when equal and as infinity otherwise. NaN at the same places is equal.
    """
    config = SessionConfig(threads=threads, arena=False)  # one session's memory is gone before the other's
    expected = run(open_session(reference, config), feeds)
    actual = run(open_session(other, config), feeds)
    return largest_difference(expected, actual)


def largest_difference(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> float:
    """Return the same for outputs that were computed already; other shapes count as infinitely different."""
    return max((_difference(expected[name], actual[name]) for name in expected), default=0.0)


def _difference(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    if expected.dtype.kind != "f":
        return 0.0 if np.array_equal(expected, actual) else float("inf")
    if np.array_equal(expected, actual, equal_nan=True):
        return 0.0
    magnitude = float(np.max(np.abs(expected), initial=0.0)) or 1.0
    difference = float(np.max(np.abs(expected.astype(np.float64) - actual.astype(np.float64))))
    return difference / magnitude if np.isfinite(difference) else float("inf")


def rms_difference(expected: Mapping[str, np.ndarray], actual: Mapping[str, np.ndarray]) -> float:
    """Return the largest root mean square difference of any float output, relative to that output's root mean square.

    Other shapes and values that are not finite count as infinitely different.
    """
    return max((_rms(expected[name], actual[name]) for name in expected), default=0.0)


def _rms(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    wanted, found = expected.astype(np.float64), actual.astype(np.float64)
    size = float(np.sqrt(np.mean(wanted**2))) if wanted.size else 0.0
    difference = float(np.sqrt(np.mean((wanted - found) ** 2))) if wanted.size else 0.0
    if difference == 0.0:
        return 0.0
    return difference / size if size and np.isfinite(difference) else float("inf")
