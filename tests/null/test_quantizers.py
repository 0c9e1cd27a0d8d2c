"""Scales and zero points from ranges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.plan.quantizers import BIAS_LIMIT, activation_params, weight_scale, widen_for_bias
from bitwright.passes.round_nearest import round_to_nearest
from bitwright.targets.schema import QSpace

U8 = QSpace(signed=False)
S8 = QSpace(signed=True)
S8_SYMMETRIC = QSpace(signed=True, symmetric=True)
U8_SYMMETRIC = QSpace(signed=False, symmetric=True)
W8 = QSpace(signed=True, symmetric=True, granularity="channel", narrow=True)

reals = st.floats(-1e6, 1e6, width=32)


@pytest.mark.parametrize(
    ("space", "low", "high", "expected"),
    [
        (U8, 0.0, 255.0, ("uint8", 1.0, 0)),
        (U8, -1.0, 254.0, ("uint8", 1.0, 1)),
        (U8, 10.0, 255.0, ("uint8", 1.0, 0)),
        (S8, 0.0, 255.0, ("int8", 1.0, -128)),
        (S8_SYMMETRIC, -12.7, 3.0, ("int8", float(np.float32(0.1)), 0)),
        (U8_SYMMETRIC, -12.7, 3.0, ("uint8", float(np.float32(0.1)), 128)),
        (U8, 0.0, 0.0, ("uint8", 1.0, 0)),
    ],
)
def test_examples(space: QSpace, low: float, high: float, expected: tuple[str, float, int]) -> None:
    assert activation_params(low, high, space) == expected


@given(reals, reals, st.sampled_from([U8, S8]))
def test_zero_is_exact_and_the_range_is_covered(a: float, b: float, space: QSpace) -> None:
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    dtype, scale, zero_point = activation_params(low, high, space)
    info = np.iinfo(dtype)
    assert info.min <= zero_point <= info.max
    # Rounding the zero point moves each end by at most half a step; float32 rounding of the scale adds a little.
    slack = scale * (0.5 + 1e-3)
    assert (info.min - zero_point) * scale <= low + slack
    assert (info.max - zero_point) * scale >= high - slack


def test_weight_scales_per_channel_and_dead_channels() -> None:
    weight = np.array([[127.0, 0.0, 1.0], [-12.7, 0.0, -2.0]], np.float32)
    np.testing.assert_array_equal(weight_scale(weight, 1, W8), np.float32([1.0, 1.0, 2 / 127]))
    np.testing.assert_array_equal(weight_scale(weight, None, W8), np.float32([1.0]))


def test_rounding_is_half_to_even_and_leaves_out_the_smallest_integer() -> None:
    weight = np.float32([[0.5, 1.5, -0.5, -200.0, 200.0]])
    quant = WeightQuant("w", "int8", None, np.float32([1.0]))
    np.testing.assert_array_equal(round_to_nearest(weight, quant), np.int8([[0, 2, 0, -127, 127]]))


def test_a_bias_that_would_overflow_widens_only_its_channel() -> None:
    scale = np.float32([1e-3, 1e-3])
    widened = widen_for_bias(scale, np.float32([1.0, 1e9]), input_scale=1e-3)
    assert widened[0] == scale[0]
    assert abs(1e9 / (1e-3 * float(widened[1]))) <= BIAS_LIMIT * (1 + 1e-6)


def test_denormal_channels_get_a_usable_scale() -> None:
    scale = weight_scale(np.full((2, 1), 1e-44, np.float32), 1, W8)
    assert np.isfinite(1 / scale).all()
