"""The predicted error of a quantized product: against a plain computation, and honest about unseen rows."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.compiler.rounding.product_error import (
    AffineQuantizer,
    ProductError,
    fit_quantizer,
    nearest_columns,
)

ROWS = np.random.default_rng(0).standard_normal((200, 12)).astype(np.float32)
BOUNDED = np.clip(ROWS, -1.2, 1.2)  # both halves have the same extremes: nothing unseen is clipped
WEIGHT = np.random.default_rng(1).standard_normal((12, 5)).astype(np.float32)
ONE = np.ones(12, np.float32)


def test_the_quantizer_is_the_affine_one() -> None:
    quantizer = AffineQuantizer(0.5, 3.0, 8)
    values = np.array([[-9.0, -1.6, -0.3, 0.0, 0.8, 9.0]], np.float32)
    np.testing.assert_array_equal(quantizer(values), [[-1.5, -1.5, -0.5, 0.0, 1.0, 2.0]])
    np.testing.assert_allclose(quantizer.noise(values), ((quantizer(values) - values) ** 2)[0], rtol=1e-6)


def test_few_levels_give_up_rare_values_and_many_keep_them() -> None:
    rows = np.concatenate([ROWS, np.full((1, 12), 8, np.float32)])
    few = fit_quantizer(rows, np.ones(12), 8)
    many = fit_quantizer(rows, np.ones(12), 1 << 16)
    assert few(rows).max() < 7
    assert many(rows).max() == pytest.approx(8, rel=1e-3)


def test_a_value_that_is_always_zero_costs_nothing() -> None:
    zeros = np.zeros((8, 12), np.float32)
    assert ProductError(zeros, WEIGHT).of(lambda _: (None, ONE)) == 0


def test_columns_are_rounded_by_their_own_scale() -> None:
    rounded = nearest_columns(np.array([[1.0, 100.0, 0.0], [0.26, -49.0, 0.0]], np.float32), 2)
    np.testing.assert_array_equal(rounded, [[1.0, 100.0, 0.0], [0.5, -50.0, 0.0]])


def test_the_error_falls_with_the_levels_as_theory_says() -> None:
    """Eight times the levels: a 64th of the noise power."""
    errors = [ProductError(BOUNDED, WEIGHT, 2**b, 2**20).of(lambda _: (None, ONE)) for b in (6, 9)]
    assert errors[0] / errors[1] == pytest.approx(64, rel=0.6)


def test_statistics_never_see_the_rows_they_are_judged_on() -> None:
    seen: list[np.ndarray] = []

    def rewrite(rows: np.ndarray) -> tuple[None, np.ndarray]:
        seen.append(rows)
        return None, ONE

    ProductError(ROWS, WEIGHT).of(rewrite)
    np.testing.assert_array_equal(np.concatenate(seen), ROWS)


def test_copies_and_factors_change_nothing_but_rounding() -> None:
    error = ProductError(BOUNDED, WEIGHT, 2**20, 2**20)
    index, counts = np.repeat(np.arange(12), 2), np.full(24, 2, np.float32)
    assert error.of(lambda _: (index, counts)) < 1e-6
    assert error.of(lambda rows: (None, np.abs(rows).max(axis=0))) < 1e-6
    assert error.noise(lambda _: (index, counts)) < 1e-6 * float(((BOUNDED @ WEIGHT) ** 2).sum())
