"""Properties of scale search, GPTQ and coordinate refinement on small random and hostile problems."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.errors import DataError, InternalError, ModelError
from bitwright.compiler.rounding.coordinate import refine
from bitwright.compiler.rounding.gptq import factorize, gptq
from bitwright.compiler.rounding.grid import Quantizer, codebook, integer_grid
from bitwright.compiler.rounding.layout import as_matrices, from_matrices
from bitwright.compiler.rounding.objective import damped, output_error, shrinkage_of
from bitwright.compiler.rounding.scale_search import (
    Layout,
    choose_layout,
    search_scales,
    weighted_error,
)

GRIDS = [integer_grid(4), integer_grid(2), integer_grid(8, narrow=True), codebook("nf4"), codebook("ternary")]


def problem(seed, groups=1, depth=24, columns=5, rows=40, outlier=1.0):
    """Return weights (G, K, N) and the second moment of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, rows, depth)) @ rng.normal(size=(groups, depth, depth))
    x[:, :, 0] *= outlier
    weights = rng.normal(size=(groups, depth, columns)).astype(np.float32)
    return weights, np.einsum("gnk,gnl->gkl", x, x) / rows


def wide(array):
    return array.astype(np.float64)


def naive_error(objective, residual):
    return np.einsum("gkn,gkl,gln->gn", wide(residual), objective, wide(residual))


def maxabs(weights, grid, group=0):
    depth = weights.shape[1]
    starts = np.arange(0, depth, group or depth)
    scale = np.maximum.reduceat(np.abs(weights), starts, axis=1) / np.float32(grid.reach)
    return Quantizer(grid, scale.astype(np.float32), None, group if len(starts) > 1 else 0)


problems = st.builds(
    problem,
    st.integers(0, 10**6),
    groups=st.sampled_from([1, 3]),
    depth=st.integers(1, 40),
    columns=st.integers(1, 6),
    rows=st.sampled_from([2, 30, 200]),
    outlier=st.sampled_from([1.0, 1e4, 0.0]),
)


@settings(deadline=None, max_examples=60)
@given(
    case=problems, grid=st.sampled_from(GRIDS), group=st.sampled_from([0, 7, 16]), block=st.integers(1, 20)
)
def test_gptq_is_never_worse_than_rounding_to_nearest_and_refinement_never_worse_than_gptq(
    case, grid, group, block
):
    weights, second = case
    quantizer = maxabs(weights, grid, group)
    feedback = factorize(second)
    nearest = quantizer.nearest(weights)
    rounded = gptq(weights, feedback, quantizer, block=block)
    refined = refine(weights, rounded, feedback.objective, quantizer, block=block)
    errors = [
        naive_error(feedback.objective, weights - quantizer.dequantize(levels))
        for levels in (nearest, rounded, refined)
    ]
    # Errors are compared from float32 products, good to 1e-5 of the largest in the problem.
    slack = 1e-5 * (errors[0].max() + 1e-30)
    assert (errors[1] <= errors[0] * (1 + 1e-4) + slack).all()
    assert (errors[2] <= errors[1] * (1 + 1e-4) + slack).all()
    for levels in (rounded, refined):
        assert np.isin(levels, grid.values.astype(np.float32)).all()


def textbook_gptq(weights, objective, quantizer, order):
    """Return levels by the paper's algorithm 1: feedback through the Cholesky factor of the inverse."""
    inverse = np.linalg.inv(objective[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    work = wide(weights)[order]
    levels = np.zeros_like(work)
    for j, row in enumerate(order):
        step = quantizer.scale[0, row // quantizer.group] if quantizer.group else quantizer.scale[0, 0]
        levels[j] = np.clip(np.rint(work[j] / step), quantizer.grid.low, quantizer.grid.high)
        error = (work[j] - levels[j] * step) / upper[j, j]
        work[j:] -= np.outer(upper[j, j:], error)
    result = np.zeros_like(levels)
    result[order] = levels
    return result


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group", [0, 8])
def test_levels_are_those_of_the_papers_algorithm(group, act_order):
    weights, second = problem(3, depth=32, columns=7, rows=300)
    quantizer = maxabs(weights, integer_grid(4), group)
    feedback = factorize(second, act_order=act_order)
    expected = textbook_gptq(weights[0], feedback.objective[0], quantizer, feedback.order[0])
    found = gptq(weights, feedback, quantizer, block=5)[0]
    error = naive_error(feedback.objective, weights - quantizer.dequantize(found[None]))
    nearest = naive_error(feedback.objective, weights - quantizer.dequantize(quantizer.nearest(weights)))
    kept = (error < nearest)[0]
    assert kept.any()
    np.testing.assert_array_equal(found[:, kept], expected[:, kept])


def test_act_order_starts_with_the_most_powerful_input():
    _, second = problem(1)
    order = factorize(second).order[0]
    power = np.diagonal(second[0])
    assert order[0] == power.argmax() and order[-1] == power.argmin()
    np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))


def test_gptq_helps_where_inputs_are_correlated():
    weights, second = problem(5, depth=48, columns=32, rows=500)
    quantizer = maxabs(weights, integer_grid(4), 16)
    feedback = factorize(second)
    nearest = output_error(feedback.objective, weights - quantizer.dequantize(quantizer.nearest(weights)))
    rounded = output_error(
        feedback.objective, weights - quantizer.dequantize(gptq(weights, feedback, quantizer))
    )
    assert rounded.sum() < 0.6 * nearest.sum()


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.name)
def test_representable_weights_stay_exactly(grid):
    rng = np.random.default_rng(0)
    _, second = problem(2, depth=24)
    scale = np.array([0.5, 2.0, 1.0], np.float32).reshape(1, 3, 1)
    quantizer = Quantizer(grid, np.repeat(scale, 5, axis=2), None, 8)
    levels = rng.choice(grid.values, size=(1, 24, 5)).astype(np.float32)
    weights = quantizer.dequantize(levels)
    feedback = factorize(second)
    np.testing.assert_array_equal(gptq(weights, feedback, quantizer), levels)
    np.testing.assert_array_equal(refine(weights, levels, feedback.objective, quantizer), levels)


def test_refinement_finds_the_best_of_all_roundings_of_a_small_problem_or_stays_close():
    ratios = []
    for seed in range(10):
        weights, second = problem(seed, depth=6, columns=1, rows=100)
        quantizer = maxabs(weights, integer_grid(3))
        feedback = factorize(second)
        floor = np.floor(weights / quantizer.row_scale(6))
        candidates = floor[0, :, 0] + np.array(list(product([0, 1], repeat=6)), np.float32)
        candidates = np.clip(candidates, -4, 3).T[None]
        best = naive_error(feedback.objective, weights - quantizer.dequantize(candidates)).min()
        found = refine(weights, gptq(weights, feedback, quantizer), feedback.objective, quantizer)
        ratios.append(naive_error(feedback.objective, weights - quantizer.dequantize(found))[0, 0] / best)
    assert np.median(ratios) < 1.05 and max(ratios) < 2


def test_refinement_repairs_a_bad_start_on_every_kind_of_grid():
    for grid in GRIDS:
        weights, second = problem(4, rows=200)
        quantizer = maxabs(weights, grid)
        objective = damped(second)
        start = np.full_like(weights, grid.values[len(grid.values) // 2])
        found = refine(weights, start, objective, quantizer, sweeps=40)
        before, after = (output_error(objective, weights - quantizer.dequantize(v)) for v in (start, found))
        assert (after < before).all()


def test_inputs_that_were_always_zero_are_rounded_to_nearest_and_touch_nothing():
    weights, second = problem(7)
    second[:, 3, :] = second[:, :, 3] = 0
    quantizer = maxabs(weights, integer_grid(4))
    found = gptq(weights, factorize(second), quantizer)
    np.testing.assert_array_equal(found[:, 3], quantizer.nearest(weights)[:, 3])
    other = weights.copy()
    other[:, 3] *= 0.5
    again = gptq(other, factorize(second), quantizer)
    np.testing.assert_array_equal(np.delete(again, 3, axis=1), np.delete(found, 3, axis=1))


@pytest.mark.parametrize("second", [np.zeros((1, 8, 8)), np.ones((1, 8, 8)), np.full((1, 8, 8), 1e-300)])
def test_singular_moments_are_no_obstacle(second):
    weights = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
    quantizer = maxabs(weights, integer_grid(4))
    found = gptq(weights, factorize(second), quantizer)
    assert np.isfinite(quantizer.dequantize(found)).all()


def test_damping_grows_until_the_factorization_succeeds():
    # Not positive semidefinite, as rounding errors may leave a moment: its smallest eigenvalue is -0.05.
    second = np.diag([1.05, 1.0, 1.0, 1.0])[None].copy()
    second[0, 0, 1] = second[0, 1, 0] = 1.075
    feedback = factorize(second)
    assert feedback.damping == pytest.approx(0.1)
    with pytest.raises(DataError, match="positive definite"):
        factorize(np.where(np.eye(4) == 1, 1.0, 50.0)[None])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    weights, second = problem(0)
    quantizer, feedback = maxabs(weights, integer_grid(4)), factorize(second)
    broken = weights.copy()
    broken[0, 2, 1] = bad
    with pytest.raises(ModelError):
        gptq(broken, feedback, quantizer)
    with pytest.raises(ModelError):
        refine(broken, quantizer.nearest(weights), feedback.objective, quantizer)
    with pytest.raises(ModelError):
        search_scales(broken, np.ones((1, 24)), integer_grid(4))
    second[0, 1, 1] = bad
    with pytest.raises(DataError):
        factorize(second)


def test_shrinkage_weakens_correlations_and_keeps_powers():
    _, second = problem(0)
    found = damped(second, 0.0, 0.25)
    np.testing.assert_allclose(np.diagonal(found[0]), np.diagonal(second[0]))
    np.testing.assert_allclose(found[0, 0, 1], 0.75 * second[0, 0, 1])
    assert shrinkage_of(0) == 1 and shrinkage_of(10**6) < 1e-3


@settings(deadline=None, max_examples=40)
@given(
    case=problems,
    grid=st.sampled_from(GRIDS),
    layout=st.sampled_from([Layout(), Layout(16), Layout(7), Layout(per_tensor=True)]),
)
def test_searched_scales_are_never_worse_than_max_abs(case, grid, layout):
    weights, second = case
    importance = np.einsum("gkk->gk", damped(second))
    found = search_scales(weights, importance, grid, layout)
    largest = np.abs(weights).max()
    whole = Quantizer(grid, np.full((1, 1, 1), largest / grid.reach, np.float32))
    reference = whole if layout.per_tensor else maxabs(weights, grid, layout.group)
    limit = weighted_error(weights, importance, reference)
    # A float32 product is good to 6e-8 of a weight: errors below that are none.
    noise = float((importance[:, :, None] * wide(weights) ** 2).sum()) * 1e-13
    assert weighted_error(weights, importance, found) <= limit * (1 + 1e-4) + noise
    assert (found.scale > 0).all()


def test_zero_points_pay_for_weights_on_one_side_of_zero():
    weights = np.random.default_rng(0).uniform(1, 2, size=(1, 32, 6)).astype(np.float32)
    importance = np.ones((1, 32))
    plain = search_scales(weights, importance, integer_grid(4))
    shifted = search_scales(weights, importance, integer_grid(4), Layout(zero_points=True))
    assert shifted.zero_point is not None
    assert weighted_error(weights, importance, shifted) < 0.5 * weighted_error(weights, importance, plain)
    low, high = shifted.zero_point.min(), shifted.zero_point.max()
    assert low >= -8 and high <= 7 and (shifted.zero_point == np.rint(shifted.zero_point)).all()


def test_a_codebook_has_no_zero_point():
    with pytest.raises(InternalError, match="nf4"):
        search_scales(
            np.ones((1, 4, 1), np.float32), np.ones((1, 4)), codebook("nf4"), Layout(zero_points=True)
        )


def test_importance_decides_which_weights_are_met():
    weights = np.array([1.0, 0.37, -0.21, 0.11], np.float32).reshape(1, 4, 1)
    errors = []
    for important in (0, 1):
        importance = np.full((1, 4), 1e-3)
        importance[0, important] = 1.0
        quantizer = search_scales(weights, importance, integer_grid(2))
        residual = np.abs(weights - quantizer.dequantize(quantizer.nearest(weights)))
        errors.append(residual[0, important, 0])
    assert max(errors) < 0.02


def test_blocks_of_zeros_get_scale_one_and_huge_weights_finite_scales():
    weights = np.zeros((1, 32, 2), np.float32)
    weights[0, 16:, 1] = 1e30
    found = search_scales(weights, np.ones((1, 32)), integer_grid(4), Layout(16))
    assert found.scale[0, 0, 0] == found.scale[0, 0, 1] == found.scale[0, 1, 0] == 1
    np.testing.assert_allclose(found.dequantize(found.nearest(weights)), weights, rtol=1e-5)


def test_the_coarsest_layout_that_is_good_enough_is_chosen():
    rng = np.random.default_rng(0)
    layouts = [Layout(per_tensor=True), Layout(), Layout(16)]
    even = rng.choice([-1.0, 1.0], size=(1, 64, 8)).astype(np.float32)
    importance = np.ones((1, 64))
    assert choose_layout(even, importance, integer_grid(4), layouts)[0] == layouts[0]
    columns = even * np.geomspace(1, 1e3, 8, dtype=np.float32)
    assert choose_layout(columns, importance, integer_grid(4), layouts)[0] == layouts[1]
    blocks = even * np.repeat(np.geomspace(1, 1e3, 4, dtype=np.float32), 16)[None, :, None]
    assert choose_layout(blocks, importance, integer_grid(4), layouts)[0] == layouts[2]


@pytest.mark.parametrize(("shape", "groups"), [((6, 4, 3, 3), 1), ((6, 2, 3, 2), 2), ((8, 1, 3), 8)])
def test_convolution_weights_become_matrices_and_back(shape, groups):
    weight = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrices = as_matrices(weight, groups, conv=True)
    assert matrices.shape == (groups, np.prod(shape[1:]), shape[0] // groups)
    np.testing.assert_array_equal(matrices[0, :, 0], weight[0].ravel())
    np.testing.assert_array_equal(from_matrices(matrices, shape, conv=True), weight)
