"""LLM.int8's split: the function stays, the integers lose their outliers, the small product is named."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from linear_models import calm, model, moments_of
from pass_harness import FLOAT32, check_pass, count_ops, random, run_onnxruntime

from bitwright.passes.split_outliers import SplitOutliers, float_products

OPTIONS = {"counts": (2, 4)}


def spiky_input(outlier: float = 60.0) -> np.ndarray:
    x = random(4, 64, 32)
    x[..., [3, 20]] *= outlier
    return x


def check(parsed: ir.Model, x: np.ndarray, fires: int, ops: dict[str, int]) -> None:
    """Run the pass and compare the integer layer's moments with new ones."""
    moments = moments_of(parsed, {"x": x})
    before = {name: moment.largest.max() for name, moment in moments.items()}
    step = SplitOutliers(moments, **OPTIONS)  # type: ignore[arg-type]
    check_pass(step, parsed, {"x": x}, fires=fires, ops=ops, bound=FLOAT32)
    fresh = moments_of(parsed, {"x": x})
    assert float_products(parsed) == {name for name in fresh if name not in moments}
    for name, moment in moments.items():
        np.testing.assert_allclose(moment.second, fresh[name].second, rtol=1e-4, atol=1e-5)
        assert (moment.largest.max() < before[name] / 5) == bool(fires)


BIAS = """(float[N, T, 32] x, float[32, 8] w, float[8] b) => (float[N, T, 8] y) {
    u = MatMul (x, w)
    y = Add (b, u)
}"""


def weight() -> np.ndarray:
    return calm(random(32, 8, seed=4), 3, 20)


def test_a_layer_with_bias_keeps_it_next_to_its_product() -> None:
    parsed = model(BIAS, w=weight(), b=random(8))
    check(parsed, spiky_input(), 1, {"Gather": 1, "Mul": 1, "MatMul": 2, "Add": 2})
    bias = next(n for n in parsed.graph if n.op_type == "Add")
    assert bias.inputs[1] is not None
    assert bias.inputs[1].producer() is next(n for n in parsed.graph if n.op_type == "MatMul")


def test_two_layers_share_the_mask_and_the_gather() -> None:
    text = """(float[N, T, 32] x, float[32, 8] w, float[32, 8] v) => (float[N, T, 8] y, float[N, T, 8] z) {
        y = MatMul (x, w)
        z = MatMul (x, v)
    }"""
    parsed = model(text, w=weight(), v=calm(random(32, 8, seed=5), 3, 20))
    check(parsed, spiky_input(), 1, {"Gather": 1, "Mul": 1, "MatMul": 4, "Add": 2})


def test_a_gemm_and_other_readers() -> None:
    text = """(float[N, 32] x, float[32, 8] w, float[8] b) => (float[N, 8] y, float[N, 32] z) {
        h = Relu (x)
        u = Gemm (h, w, b)
        y = Relu (u)
        z = Neg (h)
    }"""
    parsed = model(text, w=weight(), b=random(8))
    check(
        parsed,
        spiky_input().reshape(-1, 32),
        1,
        {"Relu": 2, "Gemm": 1, "Neg": 1, "Gather": 1, "Mul": 1, "MatMul": 1, "Add": 1},
    )


def test_even_inputs_are_left_alone() -> None:
    parsed = model(BIAS, w=weight(), b=random(8))
    check(parsed, spiky_input(outlier=1.0), 0, {"MatMul": 1, "Add": 1})


@pytest.mark.parametrize("tokens", [1, 5])
def test_any_length(tokens: int) -> None:
    parsed = model(BIAS, w=weight(), b=random(8))
    SplitOutliers(moments_of(parsed, {"x": spiky_input()}), **OPTIONS).run(parsed)  # type: ignore[arg-type]
    x = random(2, tokens, 32, seed=8)
    wanted = x @ weight() + random(8)
    np.testing.assert_allclose(run_onnxruntime(parsed, {"x": x})["y"], wanted, rtol=1e-4, atol=1e-4)
    assert count_ops(parsed)["Gather"] == 1
