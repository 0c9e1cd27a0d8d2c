"""The float32 fused multiply-add against exact rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.interpret.fma import fma


def rounded(exact: Fraction) -> np.float32:
    """Round a rational number to float32, ties to even, by comparing with the two neighbours."""
    # Division of the integers rounds once to float64; the float32 neighbours of that bracket the exact value.
    near = np.float32(exact.numerator / exact.denominator)
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    candidates = [c for c in candidates if np.isfinite(c)]
    distance = [abs(Fraction(float(c)) - exact) for c in candidates]
    best = min(distance)
    ties = [c for c, d in zip(candidates, distance, strict=True) if d == best]
    return next((c for c in ties if c.view(np.int32) % 2 == 0), ties[0])


def exact(a: float, b: float, c: float) -> Fraction:
    return Fraction(a) * Fraction(b) + Fraction(c)


def agrees(a: float, b: float, c: float) -> bool:
    got = fma(*(np.array([v], np.float32) for v in (a, b, c)))[0]
    return bool(got == rounded(exact(a, b, c)))


F32 = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**40), max_value=2.0**40)


@settings(max_examples=1500, deadline=None)
@given(F32, F32, F32)
def test_any_floats(a: float, b: float, c: float) -> None:
    assert agrees(a, b, c)


@settings(max_examples=1500, deadline=None)
@given(
    st.integers(0, 255), st.floats(2.0**-7, 128, width=32), st.integers(-(2**24), 2**24), st.integers(-12, 6)
)
def test_near_ties(q: int, ratio: float, bits: int, exponent: int) -> None:
    """c lies a tie's distance from the product, as requantized sums do."""
    c = float(np.float32(bits * 2.0**exponent))
    assert agrees(float(q), ratio, c)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("power", [25, 30, 40, 60, 90, 120])
def test_double_rounding_would_go_wrong(sign: int, direction: int, power: int) -> None:
    """(1 + 2**-12) squared lies midway between two float32; an addend of any size must break the tie."""
    a = float(np.float32(1 + 2.0**-12))
    assert Fraction(a) ** 2 == Fraction(2**24 + 2**13 + 1, 2**24)
    assert agrees(sign * a, a, sign * direction * 2.0**-power)


def test_the_naive_form_fails_where_ours_does_not() -> None:
    """Rounding through float64 without the correction is wrong here: the test above can fail."""
    a = b = np.float32(1 + 2.0**-12)
    c = np.float32(2.0**-60)
    naive = np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    right = rounded(exact(float(a), float(b), float(c)))
    assert naive != right
    assert fma(np.array([a]), np.array([b]), np.array([c]))[0] == right


def test_special_values_and_broadcasting() -> None:
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    a = np.array([inf, 0.0, 3e38, 1.0, nan], np.float32)
    found = fma(a, np.array(10, np.float32), np.array([1, 0, 0, -10, 1], np.float32))
    assert found[:4].tolist() == [np.inf, 0.0, np.inf, 0.0]
    assert np.isnan(found[4])
    assert fma(np.ones((2, 1), np.float32), np.ones(3, np.float32), np.zeros(1, np.float32)).shape == (2, 3)


def test_subnormal_results() -> None:
    """The spacing below 2**-126 is wider than the mantissa suggests; the rounding must follow it."""
    a, b = np.float32(2.0**-75), np.float32(2.0**-74)
    c = np.float32(2.0**-149)
    assert agrees(float(a), float(b), float(c))
    assert agrees(float(np.float32(1.5 * 2.0**-75)), float(b), float(c))
    assert agrees(float(a), float(-b), float(3 * c))
