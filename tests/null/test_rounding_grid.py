"""Levels of every format against independent definitions."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.compiler.errors import InternalError, UsageError
from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.plan.weight_grids import grid_of
from bitwright.compiler.rounding.grid import CODEBOOKS, Quantizer, codebook, integer_grid
from bitwright.passes.stored_weights import integer_range


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_float8_levels_are_all_finite_values(name, dtype):
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    expected = np.unique(every[np.isfinite(every)])
    np.testing.assert_array_equal(codebook(name).values, expected)


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_float8_rounding_is_that_of_a_cast(name, dtype):
    grid = codebook(name)
    middles = (grid.values[1:] + grid.values[:-1]) / 2
    numbers = np.concatenate([middles, np.random.default_rng(0).normal(size=2000) * 100]).astype(np.float32)
    numbers = numbers[np.abs(numbers) <= grid.high]
    np.testing.assert_array_equal(grid.nearest(numbers), numbers.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_integer_grids_hold_every_integer_of_their_width(bits, signed):
    grid = integer_grid(bits, signed=signed)
    assert len(grid.values) == 2**bits and grid.uniform
    assert grid.low == (-(2 ** (bits - 1)) if signed else 0)


def test_a_narrow_grid_is_symmetric():
    grid = integer_grid(4, narrow=True)
    assert (grid.low, grid.high, grid.reach) == (-7, 7, 7)
    assert integer_grid(4).reach == 7


@pytest.mark.parametrize(("bits", "narrow"), [(0, False), (9, False), (1, True)])
def test_widths_that_do_not_exist_are_refused(bits, narrow):
    with pytest.raises(UsageError, match=r"no.* integer grid"):
        integer_grid(bits, narrow=narrow)


def test_an_unknown_codebook_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="nf4"):
        codebook("nf5")


grids = st.sampled_from([*(codebook(n) for n in CODEBOOKS), *(integer_grid(b) for b in (1, 2, 4, 8))])


@given(grid=grids, numbers=st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=20))
def test_nearest_is_the_nearest(grid, numbers):
    array = np.array(numbers, np.float32)
    found = grid.nearest(array).astype(np.float64)
    assert np.isin(found, grid.values.astype(np.float32)).all()
    best = np.abs(array[:, None] - grid.values).min(axis=1)
    # NF4's values are rounded to float32 when they are returned.
    np.testing.assert_allclose(np.abs(array - found), best, rtol=1e-6, atol=1e-6)


@given(grid=grids)
def test_levels_are_their_own_nearest(grid):
    np.testing.assert_array_equal(grid.nearest(grid.values), grid.values)


def test_a_quantizers_scales_must_fit_its_groups():
    with pytest.raises(InternalError):
        Quantizer(integer_grid(4), np.ones((1, 2, 3), np.float32))


def test_groups_repeat_over_rows_and_the_last_may_be_short():
    scale = np.array([1.0, 2.0], np.float32).reshape(1, 2, 1)
    quantizer = Quantizer(integer_grid(4), scale, None, 3)
    np.testing.assert_array_equal(quantizer.row_scale(5)[0, :, 0], [1, 1, 1, 2, 2])
    levels = quantizer.nearest(np.full((1, 5, 2), 4.0, np.float32))
    np.testing.assert_array_equal(levels[0, :, 0], [4, 4, 4, 2, 2])
    np.testing.assert_array_equal(quantizer.dequantize(levels), 4.0)


ONE = np.ones(1, np.float32)
ENTRIES = [
    WeightQuant("w", "int8", 1, ONE),
    WeightQuant("w", "int8", None, ONE, bits=4),
    WeightQuant("w", "int4", 0, np.ones((1, 1), np.float32), group=32, bits=4),
    WeightQuant("w", "int4", 1, ONE, bits=4),
    WeightQuant("w", "int8", 0, np.ones((1, 1), np.float32), group=32, bits=8),
    WeightQuant("w", "uint4", 0, np.ones((1, 1), np.float32), group=32, bits=4),
    WeightQuant("w", "uint4", 0, np.ones((1, 1), np.float32), np.zeros((1, 1), np.uint8), 32, 4),
    WeightQuant("w", "int4", 0, np.ones((1, 1), np.float32), np.zeros((1, 1), np.int8), 32, 4),
    WeightQuant("w", "int2", 1, ONE, bits=2, codebook="ternary"),
    WeightQuant("w", "int2", 1, ONE, bits=2, codebook="binary"),
]


@pytest.mark.parametrize("quant", ENTRIES, ids=lambda q: f"{q.dtype}-{q.group}-{q.codebook}-{q.zero_point}")
def test_the_grid_of_an_entry_is_what_may_be_stored_for_it(quant):
    grid = grid_of(quant)
    assert grid is not None
    assert (grid.low, grid.high) == integer_range(quant)


def test_half_precision_has_no_levels():
    assert grid_of(WeightQuant("w", "float16", None, ONE, bits=16)) is None
