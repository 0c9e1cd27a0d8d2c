"""Each calibration method against a brute-force reference on the samples themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.calibrate.clipping import expected_square_error
from bitwright.compiler.calibrate.histogram import GrowingHistogram
from bitwright.compiler.calibrate.methods import (
    METHODS,
    Entropy,
    MinMax,
    MovingAverage,
    Mse,
    Percentile,
    parse_method,
    range_from,
)
from bitwright.compiler.calibrate.statistics import TensorStatistics
from bitwright.compiler.errors import UsageError

RNG = np.random.default_rng(0)
SHAPES = {
    "normal": RNG.normal(size=50_000),
    "laplace": RNG.laplace(size=50_000),
    "relu": np.maximum(RNG.normal(size=50_000), 0),
    "negative": -np.abs(RNG.normal(size=50_000)) - 0.1,
    "outlier": np.append(RNG.normal(size=50_000), 100.0),
    "skewed": RNG.gamma(2.0, size=50_000) - 0.5,
}
SHAPES = {k: v.astype(np.float32) for k, v in SHAPES.items()}
GRIDS = [(256, False), (255, True), (16, False)]


def statistics_of(*batches):
    found = TensorStatistics("t", histogram=GrowingHistogram(tensor="t"))
    for batch in batches:
        found.update(np.asarray(batch, np.float32))
    return found


def square_error(x, low, high, levels):
    """Quantize for real and sum the squared errors."""
    step = (high - low) / (levels - 1)
    zero = np.rint(-low / step)
    q = np.clip(np.rint(x / step) + zero, 0, levels - 1)
    return float((((q - zero) * step - x) ** 2).sum())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
@pytest.mark.parametrize("method", [m() for m in METHODS.values()], ids=str)
def test_every_range_holds_zero_and_stays_inside_the_data(name, levels, symmetric, method):
    data = SHAPES[name]
    low, high = range_from(statistics_of(data), method, levels=levels, symmetric=symmetric)
    assert low <= 0.0 <= high
    assert low < high
    limit = float(np.abs(data).max())
    if symmetric:
        assert -low == high <= limit
    else:
        assert min(float(data.min()), 0.0) <= low
        assert high <= max(float(data.max()), 0.0)


def test_minmax_is_exact_over_batches():
    found = statistics_of([1, -2], [5], [0.5, -7])
    assert range_from(found, MinMax(), levels=256, symmetric=False) == (-7.0, 5.0)
    assert range_from(found, MinMax(), levels=256, symmetric=True) == (-7.0, 7.0)


def test_the_moving_average_starts_as_a_mean():
    found = statistics_of(*([-k, 2 * k] for k in range(1, 11)))
    low, high = range_from(found, MovingAverage(), levels=256, symmetric=False)
    assert (low, high) == pytest.approx((-5.5, 11.0))


def test_the_moving_average_then_forgets_exponentially():
    found = TensorStatistics("t", averaging_constant=0.5)
    for value in (8.0, 0.0, 0.0):
        found.update(np.array([0.0, value], np.float32))
    # 8, then mean(8, 0) = 4, then 4 + 0.5 * (0 - 4) = 2
    assert range_from(found, MovingAverage(0.5), levels=256, symmetric=False) == (0.0, 2.0)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("percent", [90.0, 99.0, 99.99])
def test_percentiles_are_within_a_bin_of_numpys(name, percent):
    data, found = SHAPES[name], statistics_of(SHAPES[name])
    tail = (100 - percent) / 2
    low, high = range_from(found, Percentile(percent), levels=256, symmetric=False)
    # One bin from the histogram, and one neighbour for the two definitions of a quantile.
    order, at = np.sort(data), data.size * (1 - tail / 100)
    slack = found.histogram.width + np.ptp(order[int(at) - 1 : int(at) + 2])
    assert abs(high - max(np.percentile(data, 100 - tail), 0)) <= slack
    slack = found.histogram.width + np.ptp(order[max(int(data.size - at) - 1, 0) :][:3])
    assert abs(low - min(np.percentile(data, tail), 0)) <= slack
    _, top = range_from(found, Percentile(percent), levels=256, symmetric=True)
    assert np.mean(np.abs(data) <= top + found.histogram.width) >= percent / 100
    assert np.mean(np.abs(data) <= top - 2 * found.histogram.width) <= percent / 100


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_the_expected_error_is_the_measured_one(name, levels, symmetric):
    found = statistics_of(SHAPES[name])
    for method in (MinMax(), Percentile(99.9), Mse()):
        low, high = range_from(found, method, levels=levels, symmetric=symmetric)
        expected = expected_square_error(found.histogram.segments(), low, high, levels)
        # 50 000 values: the sampling error of the mean square is about 1 / sqrt(50 000) = 0.5 %, times four.
        assert expected == pytest.approx(square_error(SHAPES[name], low, high, levels), rel=0.02)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("levels", "symmetric"), GRIDS)
def test_mse_is_as_good_as_brute_force(name, levels, symmetric):
    data, found = SHAPES[name], statistics_of(SHAPES[name])
    error = square_error(data, *range_from(found, Mse(), levels=levels, symmetric=symmetric), levels)
    below, above = max(-float(data.min()), 0.0), max(float(data.max()), 0.0)
    sample = data[::5] if name != "outlier" else data[::-5]
    shares = np.linspace(0.02, 1, 50)
    if symmetric:
        grid = [(-max(below, above) * s, max(below, above) * s) for s in shares]
    else:
        grid = [
            (-below * a, above * b)
            for a in (shares[::4] if below else [1])
            for b in (shares if above else [1])
        ]
    best = min((square_error(sample, lo, hi, levels), lo, hi) for lo, hi in grid)
    # The search takes one end after the other; 5 % covers the joint optimum it may miss and the sampling.
    assert error <= 1.05 * square_error(data, best[1], best[2], levels)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 4), st.sampled_from(GRIDS))
def test_mse_expects_no_more_error_than_minmax(seed, power, grid):
    data = np.random.default_rng(seed).normal(0.2, 1, 500)
    found = statistics_of(np.sign(data) * np.abs(data) ** power)
    mass = found.histogram.segments()
    errors = [
        expected_square_error(mass, *range_from(found, m, levels=grid[0], symmetric=grid[1]), grid[0])
        for m in (Mse(), MinMax())
    ]
    assert errors[0] <= errors[1]


def test_mse_holds_when_a_bin_is_wider_than_a_step():
    found = statistics_of(SHAPES["normal"])
    low, high = range_from(found, Mse(), levels=65536, symmetric=False)
    # With 16 bits the rounding error is negligible: clipping anything but the last values cannot pay.
    assert low <= 0.97 * found.low
    assert high >= 0.97 * found.high


def brute_force_divergence(data, limit, levels, width):
    """KL on the samples: float64 bins by numpy.histogram, the levels by nearest grid point."""
    low, high = max(float(data.min()), -limit), min(float(data.max()), limit)
    edges = np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width
    counts = np.histogram(data[(data >= edges[0]) & (data < edges[-1])], edges)[0].astype(float)
    centres, step = (edges[:-1] + edges[1:]) / 2, (high - low) / (levels - 1)
    level = np.clip(np.rint((centres - low) / step), 0, levels - 1)
    quantized = np.zeros_like(counts)
    for k in np.unique(level):
        at = (level == k) & (counts > 0)
        if at.any():
            quantized[at] = counts[at].sum() / at.sum()
    used = np.flatnonzero(counts)
    counts[used[0]] += np.sum(data < edges[0])
    counts[used[-1]] += np.sum(data >= edges[-1])
    p, q = counts[used] / counts.sum(), quantized[used] / quantized.sum()
    return float(np.sum(p * np.log(p / q)))


@pytest.mark.parametrize("name", ["normal", "laplace", "skewed"])
def test_entropy_finds_the_brute_force_minimum(name):
    data, found = SHAPES[name].astype(np.float64), statistics_of(SHAPES[name])
    width = found.histogram.width
    low, high = range_from(found, Entropy(), levels=256, symmetric=False)
    ours = brute_force_divergence(data, max(high, -low), 256, width)
    limits = np.arange(256, np.ceil(np.abs(data).max() / width), 16) * width
    best = min(brute_force_divergence(data, t, 256, width) for t in limits)
    # 128 candidates against another 100-odd: between neighbours the divergence moves by some per cent.
    assert ours <= 1.1 * best


def test_entropy_cuts_an_outlier_and_keeps_a_uniform_range():
    _, high = range_from(statistics_of(SHAPES["outlier"]), Entropy(), levels=256, symmetric=False)
    assert high < 20
    uniform = RNG.uniform(-1, 1, 50_000)
    low, high = range_from(statistics_of(uniform), Entropy(), levels=256, symmetric=False)
    assert min(-low, high) > 0.9


def test_exact_zeros_do_not_change_entropy_and_mse():
    data = SHAPES["laplace"]
    with_zeros = np.concatenate([data, np.zeros(500_000, np.float32)])
    for method in (Entropy(), Mse()):
        expected = range_from(statistics_of(data), method, levels=256, symmetric=False)
        assert range_from(statistics_of(with_zeros), method, levels=256, symmetric=False) == expected


@pytest.mark.parametrize("method", [m() for m in METHODS.values()], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
class TestDegenerate:
    def test_all_zero(self, method, symmetric):
        found = statistics_of(np.zeros(100))
        assert range_from(found, method, levels=256, symmetric=symmetric) == (0.0, 0.0)

    @pytest.mark.parametrize("value", [3.0, -3.0, 1e-30, 1e30])
    def test_constant(self, method, symmetric, value):
        low, high = range_from(statistics_of(np.full(100, value)), method, levels=256, symmetric=symmetric)
        value = float(np.float32(value))
        assert low <= 0 <= high
        # One value: clipping it can only hurt, so its end is kept, up to the grid's rounding of it.
        assert (high if value > 0 else low) == pytest.approx(value, rel=0.01)

    def test_one_value_among_zeros_is_not_lost(self, method, symmetric):
        data = np.zeros(1_000_000)
        data[7] = 2.0
        _, high = range_from(statistics_of(data), method, levels=256, symmetric=symmetric)
        assert high > 1.9

    def test_one_value(self, method, symmetric):
        low, _ = range_from(statistics_of([-1.5]), method, levels=256, symmetric=symmetric)
        assert low == pytest.approx(-1.5, rel=0.01)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("minmax", MinMax()),
        ("moving_average", MovingAverage(0.01)),
        ("moving_average:0.1", MovingAverage(0.1)),
        ("percentile", Percentile(99.99)),
        ("percentile:99.999", Percentile(99.999)),
        ("mse", Mse()),
        (" entropy ", Entropy()),
    ],
)
def test_methods_are_read_and_written_as_text(text, method):
    assert parse_method(text) == method == parse_method(str(method))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("percentil:99", "did you mean 'percentile'"),
        ("", "known: entropy"),
        ("percentile:", "above 50, up to 100"),
        ("percentile:101", "above 50, up to 100"),
        ("percentile:nan", "above 50, up to 100"),
        ("moving_average:0", "above 0, up to 1"),
        ("mse:3", "takes no parameter"),
    ],
)
def test_wrong_methods_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse_method(text)
