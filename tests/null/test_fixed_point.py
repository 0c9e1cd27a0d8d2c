"""Integer requantization against exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.compiler.errors import ModelError
from bitwright.compiler.interpret.fixed_point import fixed_point, requantize

MULTIPLIERS = st.floats(2.0**-24, 64.0)
ACCUMULATORS = st.integers(-(2**31) + 1, 2**31 - 1)


@given(MULTIPLIERS, st.integers(8, 31))
def test_multiplier_is_the_nearest_of_its_width(real: float, bits: int) -> None:
    found = fixed_point(real, bits)
    assert 2 ** (bits - 1) <= int(found.multiplier) < 2**bits
    assert abs(float(found.value()) - real) <= real * 2.0**-bits


@given(ACCUMULATORS, MULTIPLIERS, st.integers(8, 30))
def test_half_up_is_the_floor_of_the_product_and_a_half(accumulator: int, real: float, bits: int) -> None:
    by = fixed_point(real, bits)
    exact = Fraction(accumulator * int(by.multiplier), 2 ** int(by.shift))
    expected = (exact + Fraction(1, 2)).__floor__()
    assert int(requantize(np.int64(accumulator), by, "half_up")) == expected


def _high(a: int, b: int) -> int:
    """Return gemmlowp's high product, written with exact integers."""
    product = a * b
    nudge = 1 << 30 if product >= 0 else 1 - (1 << 30)
    quotient = abs(product + nudge) >> 31
    return quotient if product + nudge >= 0 else -quotient


@given(st.integers(-(2**24), 2**24), MULTIPLIERS.filter(lambda m: m < 8))
def test_double_rounds_half_away_from_zero_twice(accumulator: int, real: float) -> None:
    by = fixed_point(real, 31)
    places = int(by.shift) - 31
    high = _high(accumulator << max(-places, 0), int(by.multiplier))
    half = Fraction(1, 2)
    exact = Fraction(high, 2 ** max(places, 0))
    expected = (exact + half).__floor__() if exact >= 0 else -((-exact + half).__floor__())
    assert int(requantize(np.int64(accumulator), by, "double")) == expected


def test_zero_stays_zero() -> None:
    by = fixed_point([0.0, 0.5], 16)
    assert requantize(np.array([100, 100]), by, "half_up").tolist() == [0, 50]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 2.0**15])
def test_what_no_multiplier_can_be_is_refused(bad: float) -> None:
    with pytest.raises(ModelError, match="fixed-point multiplier"):
        fixed_point(bad, 16)
