"""Each loss against its definition, and outputs that cannot be compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from bitwright.compiler.allocate.losses import LossKind, LossMeter


def loss(kind: LossKind, *pairs: tuple[np.ndarray, np.ndarray], name: str = "y") -> float:
    meter = LossMeter(kind)
    for exact, actual in pairs:
        meter.add(name, exact, actual)
    return meter.value()


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_sqnr_is_noise_over_signal_of_all_samples() -> None:
    a, b = np.float32([3.0, 4.0]), np.float32([0.0, 5.0])
    assert loss("sqnr", (a, a + np.float32([1.0, 0.0])), (b, b)) == pytest.approx(1.0 / (25.0 + 25.0))


def test_cosine_is_the_mean_over_samples() -> None:
    a, b = np.float32([1.0, 0.0]), np.float32([0.0, 2.0])
    assert loss("cosine", (a, b), (a, 3 * a)) == pytest.approx(0.5)


def test_cosine_keeps_digits_that_the_subtraction_would_lose() -> None:
    a = np.array([1.0, 0.0])
    assert loss("cosine", (a, np.array([1.0, 1e-9]))) == pytest.approx(0.5e-18, rel=1e-6)


@given(st.integers(0, 1000))
def test_kl_is_the_divergence_of_the_softmax(seed: int) -> None:
    a, b = random(seed, 4, 7), random(seed + 1, 4, 7)
    p, q = softmax(a.astype(np.float64), axis=1), softmax(b.astype(np.float64), axis=1)
    assert loss("kl", (a, b)) == pytest.approx(rel_entr(p, q).sum(axis=1).mean(), rel=1e-9)
    assert loss("kl", (a, a + 5)) == pytest.approx(0.0, abs=1e-12)  # softmax does not see a shift


@pytest.mark.parametrize("kind", ["sqnr", "cosine", "kl"])
def test_equal_outputs_lose_nothing(kind: LossKind) -> None:
    for a in (random(0, 3, 4), np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32), np.float32(2.0)):
        assert loss(kind, (np.asarray(a), np.asarray(a))) == 0.0


@pytest.mark.parametrize("kind", ["sqnr", "cosine", "kl"])
def test_a_mask_is_left_out_only_if_it_is_equal(kind: LossKind) -> None:
    a, b = random(0, 2, 4), random(1, 2, 4)
    a[0, 1] = b[0, 1] = -np.inf
    a[1, 2] = b[1, 2] = np.nan
    assert 0 < loss(kind, (a, b)) < math.inf
    assert loss(kind, (a, a)) == 0.0
    b[0, 1] = 0.0
    assert loss(kind, (a, b)) == math.inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_a_fault(bad: float) -> None:
    meter = LossMeter("sqnr")
    meter.add("y", np.float32([1.0]), np.float32([bad]))
    meter.add("y", np.float32([1.0]), np.float32([1.0]))
    assert (meter.value(), meter.fault) == (math.inf, "output 'y' is not finite")


def test_a_changed_shape_is_a_fault() -> None:
    meter = LossMeter("cosine")
    meter.add("y", np.zeros((1, 2)), np.zeros((1, 3)))
    assert meter.value() == math.inf
    assert "from (1, 2) to (1, 3)" in meter.fault


def test_integers_count_where_they_differ_and_outputs_count_alike() -> None:
    meter = LossMeter("sqnr")
    meter.add("classes", np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
    meter.add("scores", np.float32([2.0]), np.float32([1.0]))
    assert meter.value() == pytest.approx((0.25 + 0.25) / 2)
