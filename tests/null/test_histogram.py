"""The growing histogram: nothing is lost, and the state depends on the data alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bitwright.compiler.calibrate.histogram import GrowingHistogram
from bitwright.compiler.errors import DataError

# Not closer to zero than 1e-15: under 2**-126 bin widths float32 has no sign left to tell.
FLOATS = st.one_of(st.floats(-(2.0**40), 2.0**40, width=32), st.floats(-1, 1, width=32), st.just(0.0)).map(
    lambda x: x if abs(x) > 1e-15 else 0.0
)
BATCHES = st.lists(arrays(np.float32, st.integers(0, 60), elements=FLOATS), min_size=1, max_size=6)


def histogram_of(*batches, bins=64):
    found = GrowingHistogram(bins, "t")
    for batch in batches:
        found.update(batch)
    return found


def state(h):
    return h.exponent, h.first, h.low, h.high, h.count, h.zeros, h.counts.tolist()


@given(BATCHES)
def test_no_value_is_lost_and_the_range_is_exact(batches):
    h, data = histogram_of(*batches), np.concatenate(batches)
    assert h.count == h.counts.sum() == data.size
    assert h.zeros == np.count_nonzero(data == 0)
    if data.size:
        assert (h.low, h.high) == (data.min(), data.max())


@given(BATCHES)
def test_every_value_is_in_its_bin(batches):
    h, data = histogram_of(*batches), np.concatenate(batches).astype(np.float64)
    expected = np.floor(data / h.width).astype(np.int64) - h.first
    assert np.array_equal(h.counts, np.bincount(expected, minlength=h.bins))


@given(BATCHES, st.randoms())
def test_the_state_does_not_depend_on_order_or_split(batches, random):
    shuffled = random.sample(batches, len(batches))
    assert state(histogram_of(*shuffled)) == state(histogram_of(np.concatenate(batches)))


@given(BATCHES, BATCHES)
def test_merged_workers_equal_one_worker(left, right):
    merged = histogram_of(*left)
    merged.merge(histogram_of(*right))
    assert state(merged) == state(histogram_of(*left, *right))


@given(BATCHES.filter(lambda b: sum(x.size for x in b) > 0))
def test_the_bins_are_no_wider_than_they_need_be(batches):
    h = histogram_of(*batches)
    low, high = min(h.low, 0.0), max(h.high, 0.0)
    narrower = h.width / 2
    fits = math.floor(high / narrower) - math.floor(low / narrower) < h.bins
    assert not fits or h.exponent == -120


@settings(max_examples=200)
@given(BATCHES.filter(lambda b: sum(x.size for x in b) > 0), st.floats(0, 1))
def test_quantiles_are_within_a_bin_of_numpys(batches, share):
    h, data = histogram_of(*batches), np.concatenate(batches).astype(np.float64)
    # The quantile of n values is anything between two neighbours, hence the two methods; 1e-9 for share * n.
    below = np.quantile(data, max(share - 1e-9, 0), method="lower") - h.width
    above = np.quantile(data, min(share + 1e-9, 1), method="higher") + h.width
    if 0 < share < 1:
        # numpy spreads n values over n - 1 gaps, the histogram over n: at most one neighbour apart.
        order, at = np.sort(data), share * data.size
        below = min(below, order[max(math.ceil(at - 1e-6) - 2, 0)] - h.width)
        above = max(above, order[min(math.floor(at + 1e-6) + 1, data.size - 1)] + h.width)
    assert below <= h.quantile(share) <= above


def test_quantiles_of_many_values_are_within_a_bin_of_numpys():
    data = np.random.default_rng(1).laplace(size=100_000).astype(np.float32)
    h = histogram_of(data, bins=2048)
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0):
        assert abs(h.quantile(share) - np.quantile(data, share)) <= h.width
    assert (h.quantile(0.0), h.quantile(1.0)) == (data.min(), data.max())


def test_quantiles_of_magnitudes_are_within_a_bin_of_numpys():
    data = np.random.default_rng(2).normal(0.3, 1, 50_000).astype(np.float32)
    h = histogram_of(data, bins=2048).absolute()
    assert h.count == data.size
    assert h.high == np.abs(data).max()
    for share in (0.1, 0.5, 0.999):
        assert abs(h.quantile(share) - np.quantile(np.abs(data), share)) <= h.width


def test_exact_zeros_are_a_point_of_mass():
    h = histogram_of(np.array([0, 0, 0, 0, 0, 0, 0, 0, -1, 1], np.float32))
    assert [h.quantile(s) for s in (0.2, 0.5, 0.9)] == [0.0, 0.0, 0.0]
    mass = h.segments()
    assert mass.counts.tolist() == [1.0, 1.0]


def test_memory_does_not_grow():
    h = GrowingHistogram(64)
    for scale in range(100):
        h.update(np.full((2, 3, 4), 1.5**scale, np.float32))
    assert (h.counts.shape, h.counts.dtype, h.count) == ((64,), np.int64, 2400)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_float_type_and_shape_is_counted(dtype):
    values = np.arange(-12, 12, dtype=dtype).reshape(2, 3, 4)[:, ::-1]
    h = histogram_of(values)
    assert (h.low, h.high, h.count, h.zeros) == (-12, 11, 24, 1)


def test_the_extremes_of_float64_do_not_overflow():
    h = histogram_of(np.array([-1.7e308, 1.7e308, 1e-300]), np.array([1.0], np.float32))
    assert h.counts.sum() == h.count == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    h = histogram_of(np.ones(3, np.float32))
    before = state(h)
    with pytest.raises(DataError, match=r"tensor 't': .*NaN or infinite"):
        h.update(np.array([1, bad, 2], np.float32))
    assert state(h) == before


def test_integers_are_refused():
    with pytest.raises(DataError, match="floating-point"):
        histogram_of(np.arange(3))
