"""AWQ: the function stays, the rounding error falls."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from linear_models import model, moments_of, spiky
from pass_harness import FLOAT32, check_pass, random

from bitwright.compiler.rounding.grid import codebook, integer_grid
from bitwright.passes.scale_weights_awq import ScaleWeightsAWQ, awq_scale

NORM = """(float[N, T, 64] x, float[64] g, float[64, 24] w) => (float[N, T, 24] y) {
    h = LayerNormalization <axis = -1> (x, g)
    y = MatMul (h, w)
}"""
GELU = """(float[N, 64] x, float[64, 64] a, float[64, 24] w) => (float[N, 24] y) {
    u = MatMul (x, a)
    h = Gelu (u)
    y = MatMul (h, w)
}"""


def norm(gain: np.ndarray) -> ir.Model:
    return model(NORM, g=gain, w=random(64, 24, seed=4))


@pytest.mark.parametrize("grid", [integer_grid(4), integer_grid(3), codebook("nf4")], ids=lambda g: g.name)
@pytest.mark.parametrize("group", [0, 16, 48])
def test_outliers_are_protected_and_the_function_stays(grid: object, group: int) -> None:
    parsed = norm(spiky(64, seed=3, outlier=10, where=range(0, 64, 7)))
    feeds = {"x": random(4, 32, 64)}
    moments = moments_of(parsed, feeds)
    step = ScaleWeightsAWQ(moments, grid=grid, group=group)  # type: ignore[arg-type]
    result = check_pass(
        step, parsed, feeds, fires=1, ops={"LayerNormalization": 1, "MatMul": 1}, bound=FLOAT32
    )
    assert "r = " in result.notes[0]
    for name, fresh in moments_of(parsed, feeds).items():
        np.testing.assert_allclose(moments[name].second, fresh.second, rtol=1e-3, atol=1e-4)


def test_without_a_place_to_fold_nothing_happens() -> None:
    parsed = model(GELU, a=spiky(64, 64, seed=2), w=random(64, 24, seed=4))
    feeds = {"x": random(64, 64)}
    result = check_pass(ScaleWeightsAWQ(moments_of(parsed, feeds)), parsed, feeds, fires=0)
    assert any("does not fold" in note for note in result.notes)


def test_dead_channels_get_finite_scales() -> None:
    gain = spiky(64, seed=3, outlier=10, where=range(0, 64, 7))
    gain[5] = 0
    parsed = norm(gain)
    feeds = {"x": random(4, 32, 64)}
    check_pass(ScaleWeightsAWQ(moments_of(parsed, feeds)), parsed, feeds, fires=1, bound=FLOAT32)


def test_the_formula_of_the_paper() -> None:
    np.testing.assert_allclose(awq_scale(np.array([4.0, 1.0, 16.0]), 0.5), np.array([2, 1, 4]) / 2.0)
    np.testing.assert_allclose(awq_scale(np.array([4.0, 1.0]), 0.0), 1.0)
