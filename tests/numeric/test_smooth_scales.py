"""SmoothQuant: the function stays, the outliers go, and what would not pay is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from linear_models import SWIGLU, calm, model, moments_of, spiky
from pass_harness import FLOAT32, check_pass, count_ops, random, run_onnxruntime

from bitwright.compiler.moments import InputMoments
from bitwright.passes.contract import PassResult
from bitwright.passes.smooth_scales import SmoothScales, smoothing_scale

FIRE = {"gain": 0.05, "explicit_gain": 0.05}


def check(
    parsed: ir.Model,
    feeds: dict[str, np.ndarray],
    fires: int,
    ops: dict[str, int] | None = None,
    **options: float,
) -> tuple[PassResult, dict[str, InputMoments]]:
    """Run the pass and compare the moments it kept with newly collected ones."""
    moments = moments_of(parsed, feeds)
    step = SmoothScales(moments, **(FIRE | options))  # type: ignore[arg-type]
    result = check_pass(step, parsed, feeds, fires=fires, ops=ops, bound=FLOAT32)
    for name, fresh in moments_of(parsed, feeds).items():
        np.testing.assert_allclose(moments[name].second, fresh.second, rtol=1e-3, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(moments[name].largest, fresh.largest, rtol=1e-4, err_msg=name)
    return result, moments


NORM = """(float[N, T, 16] x, float[16] g, float[16] b, float[16, 8] q, float[16, 8] k)
    => (float[N, T, 8] y, float[N, T, 8] z) {
    h = LayerNormalization <axis = -1> (x, g, b)
    y = MatMul (h, q)
    z = MatMul (h, k)
}"""


def gain() -> np.ndarray:
    values = random(16, seed=3)
    values[1] = 30
    return values


def test_two_readers_share_a_scale_that_goes_into_the_layer_norm() -> None:
    parsed = model(
        NORM, g=gain(), b=random(16, seed=1), q=calm(random(16, 8, seed=4), 1), k=random(16, 8, seed=5)
    )
    result, moments = check(parsed, {"x": random(4, 32, 16)}, 1, {"LayerNormalization": 1, "MatMul": 2})
    assert "folded" in result.notes[0]
    largest = next(iter(moments.values())).largest[0]
    assert largest.max() / np.median(largest) < 5  # from about 30: the outlier moved into the weights
    assert len({id(m) for m in moments.values()}) == 1


def test_any_batch_and_length_give_the_same_result_afterwards() -> None:
    weights = {"g": gain(), "b": random(16, seed=1), "q": random(16, 8, seed=4), "k": random(16, 8, seed=5)}
    parsed = model(NORM, **weights)
    SmoothScales(moments_of(parsed, {"x": random(4, 32, 16)}), **FIRE).run(parsed)
    for shape in ((1, 1, 16), (3, 7, 16)):
        feeds = {"x": random(*shape, seed=9)}
        for name, wanted in run_onnxruntime(model(NORM, **weights), feeds).items():
            np.testing.assert_allclose(run_onnxruntime(parsed, feeds)[name], wanted, rtol=1e-4, atol=1e-4)


def test_a_residual_reader_keeps_its_value_and_the_layers_get_a_mul() -> None:
    text = """(float[N, T, 16] x, float[16] g, float[16] b, float[16, 16] w) => (float[N, T, 16] y) {
        h = LayerNormalization <axis = -1> (x, g, b)
        o = MatMul (h, w)
        y = Add (h, o)
    }"""
    weights = {"g": gain(), "b": random(16, seed=1), "w": random(16, 16, seed=4)}
    feeds = {"x": random(4, 32, 16)}
    result, _ = check(
        model(text, **weights), feeds, 1, {"LayerNormalization": 1, "MatMul": 1, "Add": 1, "Mul": 1}
    )
    assert "other readers" in result.notes[0]
    forbidden, _ = check(model(text, **weights), feeds, 0, explicit_gain=1.0)
    assert "does not fold" in forbidden.notes[0]


def test_a_shape_reader_does_not_forbid_folding() -> None:
    text = """(float[N, T, 16] x, float[16] g, float[16] b, float[16, 8] w)
        => (float[N, T, 8] y, int64[3] s) {
        h = LayerNormalization <axis = -1> (x, g, b)
        s = Shape (h)
        y = MatMul (h, w)
    }"""
    parsed = model(text, g=gain(), b=random(16, seed=1), w=calm(random(16, 8, seed=4), 1))
    check(parsed, {"x": random(4, 32, 16)}, 1, {"LayerNormalization": 1, "Shape": 1, "MatMul": 1})


def test_a_spelled_out_rms_norm_takes_the_scale_in_its_gain() -> None:
    text = """(float[N, T, 16] x, float[16] g, float[16, 8] w) => (float[N, T, 8] y)
    <float two = {2}, float eps = {0.00001}, float one = {1}, int64[1] last = {-1}> {
        p = Pow (x, two)
        m = ReduceMean (p, last)
        e = Add (m, eps)
        r = Sqrt (e)
        i = Div (one, r)
        n = Mul (x, i)
        h = Mul (n, g)
        y = MatMul (h, w)
    }"""
    parsed = model(text, g=gain(), w=calm(random(16, 8, seed=4), 1))
    ops = {"Pow": 1, "ReduceMean": 1, "Add": 1, "Sqrt": 1, "Div": 1, "Mul": 2, "MatMul": 1}
    check(parsed, {"x": random(4, 32, 16)}, 1, ops)


def test_a_scale_passes_relu_into_gemm_columns_and_bias() -> None:
    text = """(float[N, 16] x, float[16, 16] a, float[16] b, float[16, 8] w, float[8] c) => (float[N, 8] y) {
        u = Gemm (x, a, b)
        h = Relu (u)
        y = Gemm (h, w, c)
    }"""
    a = spiky(16, 16, seed=2)
    parsed = model(text, a=a, b=random(16, seed=1), w=calm(random(16, 8, seed=4), 1), c=random(8, seed=5))
    check(parsed, {"x": random(128, 16)}, 1, {"Gemm": 2, "Relu": 1})


def test_behind_a_gelu_it_takes_a_mul() -> None:
    text = """(float[N, 16] x, float[16, 16] a, float[16, 8] w) => (float[N, 8] y) {
        u = MatMul (x, a)
        h = Gelu (u)
        y = MatMul (h, w)
    }"""
    parsed = model(text, a=spiky(16, 16, seed=2), w=calm(random(16, 8, seed=4), 1))
    check(parsed, {"x": random(128, 16)}, 1, {"MatMul": 2, "Gelu": 1, "Mul": 1})


def test_a_swiglu_takes_the_scale_in_its_up_projection() -> None:
    gate = random(16, 32, seed=2)
    parsed = model(SWIGLU, gate=gate, up=spiky(32, 16, seed=3), down=calm(random(32, 8, seed=4), 1))
    check(parsed, {"x": random(128, 16)}, 1, {"MatMul": 3, "Sigmoid": 1, "Mul": 2})
    first = next(n for n in parsed.graph if n.outputs[0].name == "g")
    np.testing.assert_array_equal(first.inputs[1].const_value.numpy(), gate)  # type: ignore[union-attr]


# Grouped-query attention: 4 query heads of 8 read 2 key-value heads, repeated by Expand.
ATTENTION = """(float[N, 4, T, T] p, float[N, T, 16] x, float[16, 16] wv, float[16] bv, float[32, 8] wo)
    => (float[N, T, 8] y)
<int64[4] heads = {0, 0, 2, 8}, int64[1] two = {2}, int64[5] times = {1, 1, 2, 1, 1}, int64[4] all = {0, 4, -1, 8},
 int64[3] joined = {0, 0, 32}> {
    v0 = MatMul (x, wv)
    v1 = Add (v0, bv)
    v2 = Reshape (v1, heads)
    v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
    v4 = Unsqueeze (v3, two)
    v5 = Expand (v4, times)
    v = Reshape (v5, all)
    c = MatMul (p, v)
    t = Transpose <perm = [0, 2, 1, 3]> (c)
    j = Reshape (t, joined)
    y = MatMul (j, wo)
}"""


def test_values_of_grouped_attention_share_scales_between_repeated_heads() -> None:
    p = np.abs(random(2, 4, 12, 12, seed=7))
    weights = {"bv": random(16, seed=1), "wo": calm(random(32, 8, seed=4), 3, 11, 20, 28)}
    parsed = model(ATTENTION, wv=spiky(16, 16, seed=2, where=(3, 12)), **weights)
    assert parsed.graph.outputs[0].shape is not None
    feeds = {"p": p / p.sum(-1, keepdims=True), "x": random(2, 12, 16)}
    result, moments = check(parsed, feeds, 1, gain=0.5, explicit_gain=1.0)
    assert "folded" in result.notes[-1]
    assert count_ops(parsed).get("Mul", 0) == 0
    largest = moments[next(n.name for n in parsed.graph if n.outputs[0].name == "y")].largest[0]
    assert largest.max() / np.median(largest) < 10  # from about 40


def test_a_part_of_a_fused_projection_scales_alone() -> None:
    text = """(float[N, T, T] p, float[N, T, 16] x, float[16, 48] w, float[16, 8] wo)
    => (float[N, T, 8] y, float[N, T, 16] q, float[N, T, 16] k)
    <int64[3] parts = {16, 16, 16}> {
        f = MatMul (x, w)
        q, k, v = Split <axis = -1> (f, parts)
        c = MatMul (p, v)
        y = MatMul (c, wo)
    }"""
    w = spiky(48, 16, seed=2, where=(40,))
    parsed = model(text, w=w, wo=calm(random(16, 8, seed=4), 8))
    check(parsed, {"p": np.abs(random(2, 32, 32, seed=7)), "x": random(2, 32, 16)}, 1)
    weight = next(n for n in parsed.graph if n.outputs[0].name == "f").inputs[1]
    assert weight is not None and weight.const_value is not None
    np.testing.assert_array_equal(weight.const_value.numpy()[:, :32], w[:, :32])


@pytest.mark.parametrize(
    "body",
    [
        "h = Add (u, u)\n y = MatMul (h, w)",  # one operand twice
        "h = Mul (u, u)\n y = MatMul (h, w)",
        "h = Tanh (u)\n y = MatMul (h, w)",
        "h = Relu (u)\n z = Identity (u)\n y = MatMul (h, w)",  # the pre-activation is an output
        "h = Relu (u)\n z = Identity (h)\n y = MatMul (h, w)",
    ],
)
def test_what_does_not_fold_is_left_alone_where_a_mul_is_forbidden(body: str) -> None:
    extra = ", float[N, 16] z" if "z =" in body else ""
    head = f"(float[N, 16] x, float[16, 16] a, float[16, 8] w) => (float[N, 8] y{extra})"
    text = f"{head} {{ u = MatMul (x, a)\n {body} }}"
    parsed = model(text, a=spiky(16, 16, seed=2), w=calm(random(16, 8, seed=4), 1))
    check(parsed, {"x": random(128, 16)}, 0, explicit_gain=1.0)


def test_a_tied_weight_is_not_stored_twice() -> None:
    text = """(int64[N] i, float[16, 16] table, float[16] g, float[16] b) => (float[N, 16] y) {
        x = Gather <axis = 0> (table, i)
        h = LayerNormalization <axis = -1> (x, g, b)
        y = MatMul (h, table)
    }"""
    parsed = model(text, table=random(16, 16), g=gain(), b=random(16, seed=1))
    check(parsed, {"i": np.arange(64, dtype=np.int64) % 16}, 0)


def test_a_graph_output_keeps_its_value() -> None:
    text = """(float[N, T, 16] x, float[16] g, float[16] b, float[16, 8] w)
        => (float[N, T, 8] y, float[N, T, 16] h) {
        h = LayerNormalization <axis = -1> (x, g, b)
        y = MatMul (h, w)
    }"""
    parsed = model(text, g=gain(), b=random(16, seed=1), w=calm(random(16, 8, seed=4), 1))
    check(parsed, {"x": random(4, 32, 16)}, 1, {"LayerNormalization": 1, "MatMul": 1, "Mul": 1})


def test_a_subgraph_reader_keeps_its_value() -> None:
    text = """(float[N, T, 16] x, bool c, float[16] g, float[16] b, float[16, 8] w)
        => (float[N, T, 8] y, float[N, T, 16] z) {
        h = LayerNormalization <axis = -1> (x, g, b)
        y = MatMul (h, w)
        z = If (c) <
            then_branch = yes () => (float[N, T, 16] r) { r = Neg (h) },
            else_branch = no () => (float[N, T, 16] s) { s = Abs (h) }
        >
    }"""
    parsed = model(text, g=gain(), b=random(16, seed=1), w=calm(random(16, 8, seed=4), 1))
    feeds = {"x": random(4, 32, 16), "c": np.asarray(True)}
    check(parsed, feeds, 1, {"LayerNormalization": 1, "MatMul": 1, "If": 1, "Mul": 1})


def test_dead_channels_get_finite_scales() -> None:
    g, b = gain(), random(16, seed=1)
    g[4:6] = b[4:6] = 0
    q = random(16, 8, seed=4)
    q[7] = 0
    check(model(NORM, g=g, b=b, q=q, k=q.copy()), {"x": random(4, 32, 16)}, 1)


def test_even_inputs_are_left_alone() -> None:
    parsed = model(
        NORM, g=np.ones(16, np.float32), b=np.zeros(16, np.float32), q=random(16, 8), k=random(16, 8, seed=1)
    )
    moments = moments_of(parsed, {"x": random(4, 32, 16)})
    result = SmoothScales(moments).run(parsed)
    assert result.changed == 0
    assert "left as it is" in result.notes[0]


def test_a_channel_that_is_large_in_half_of_the_data_only_is_not_fitted() -> None:
    """The maxima of one half of the rows must not clip the other half."""
    x = random(256, 16)
    x[128:, :8] *= 200
    text = "(float[N, 16] x, float[16, 8] w) => (float[N, 8] y) { h = Relu (x)\n y = MatMul (h, w) }"
    parsed = model(text, w=calm(random(16, 8, seed=4), 1))
    assert SmoothScales(moments_of(parsed, {"x": x})).run(parsed).changed == 0


def test_the_formula_of_the_paper() -> None:
    largest, weight = np.array([16.0, 1.0], np.float32), np.array([[0.25], [-1.0]], np.float32)
    scale = smoothing_scale(largest, weight, 0.5, np.arange(2))
    wanted = np.array([16**0.5 / 0.25**0.5, 1.0])
    np.testing.assert_allclose(scale, wanted / np.sqrt(wanted.prod()))
    np.testing.assert_allclose(smoothing_scale(largest, weight, 1.0, np.array([0, 0])), 1.0)
