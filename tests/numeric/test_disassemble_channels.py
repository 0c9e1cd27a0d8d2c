"""QLLM's channel disassembly: exact in float, the range shrinks, and what would not pay is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linear_models import SWIGLU, calm, model, moments_of, spiky
from pass_harness import FLOAT32, check_pass, random

from bitwright.passes.contract import PassResult
from bitwright.passes.disassemble_channels import DisassembleChannels, split_counts

WIDE = {"budget": 0.5, "multiple": 4, "gain": 0.3}


def check(
    parsed: ir.Model, feeds: dict[str, np.ndarray], fires: int, ops: dict[str, int] | None = None
) -> tuple[PassResult, float]:
    """Run the pass; return also how far the largest input magnitude of the last layer fell."""
    moments = moments_of(parsed, feeds)
    name = list(moments)[-1]
    before = moments[name].largest.max()
    step = DisassembleChannels(moments, **WIDE)  # type: ignore[arg-type]
    result = check_pass(step, parsed, feeds, fires=fires, ops=ops, bound=FLOAT32)
    for label, fresh in moments_of(parsed, feeds).items():
        np.testing.assert_allclose(moments[label].second, fresh.second, rtol=1e-3, atol=1e-4, err_msg=label)
    return result, float(before / moments[name].largest.max())


FFN = """(float[N, T, 16] x, float[16, 32] a, float[32] b, float[32, 8] w) => (float[N, T, 8] y)
<float root = {1.4142135}, float one = {1}, float half = {0.5}> {
    u0 = MatMul (x, a)
    u = Add (b, u0)
    d = Div (u, root)
    e = Erf (d)
    f = Add (e, one)
    m = Mul (u, f)
    h = Mul (m, half)
    y = MatMul (h, w)
}"""


def ffn(text: str = FFN) -> ir.Model:
    return model(text, a=spiky(32, 16, seed=2, where=(1, 9)), b=random(32, seed=3), w=random(32, 8, seed=4))


def test_behind_a_gelu_producers_repeat_columns_and_a_mul_divides() -> None:
    parsed = ffn()
    ops = {"MatMul": 2, "Add": 2, "Div": 1, "Erf": 1, "Mul": 3}
    result, shrunk = check(parsed, {"x": random(4, 32, 16)}, 1, ops)
    assert "repeated by its producers" in result.notes[-1]
    assert shrunk > 2
    weight = next(n for n in parsed.graph if n.op_type == "MatMul").inputs[1]
    assert weight is not None and weight.shape is not None
    assert weight.shape[1] % 4 == 0 and 32 < weight.shape[1] <= 48  # type: ignore[operator]


def test_behind_a_swiglu_nothing_is_added() -> None:
    parsed = model(SWIGLU, gate=random(16, 32, seed=2), up=spiky(32, 16, seed=3), down=random(32, 8, seed=4))
    result, shrunk = check(parsed, {"x": random(128, 16)}, 1, {"MatMul": 3, "Sigmoid": 1, "Mul": 2})
    assert "divided by one of them" in result.notes[-1]
    assert shrunk > 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("y = MatMul", "z = Neg (h)\n y = MatMul"), "the value has another reader"),
        (("y = MatMul", "z = Neg (e)\n y = MatMul"), "a value inside has another reader"),
        (("y = MatMul", "z = Shape (u)\n y = MatMul"), "somebody asks for the width"),
    ],
)
def test_other_readers_keep_their_values(change: tuple[str, str], why: str) -> None:
    kind = "int64[3] z" if "Shape" in change[1] else "float[N, T, 32] z"
    parsed = ffn(FFN.replace(*change).replace("8] y)", f"8] y, {kind})", 1))
    result, shrunk = check(parsed, {"x": random(4, 32, 16)}, 1)
    assert "repeated by a Gather" in result.notes[-1], why
    assert shrunk > 2


def test_a_normalization_mixes_channels_so_that_a_gather_repeats_them() -> None:
    text = """(float[N, T, 16] x, float[16] g, float[16] b, float[16, 8] w) => (float[N, T, 8] y) {
        h = LayerNormalization <axis = -1> (x, g, b)
        y = MatMul (h, w)
    }"""
    parsed = model(
        text,
        g=np.where(np.arange(16) == 1, 30, random(16, seed=3)).astype(np.float32),
        b=random(16, seed=1),
        w=calm(random(16, 8, seed=4), 1),
    )
    check(parsed, {"x": random(4, 32, 16)}, 1, {"LayerNormalization": 1, "Gather": 1, "Mul": 1, "MatMul": 1})


def test_vectors_between_are_repeated_too() -> None:
    text = """(float[N, 16] x, float[16, 32] a, float[32] s, float[1] t, float[32, 8] w, float[8] c)
        => (float[N, 8] y) {
        u = MatMul (x, a)
        v = PRelu (u, s)
        p = Mul (u, s)
        q = Add (p, t)
        h = Relu (q)
        y = Gemm (h, w, c)
    }""".replace("        v = PRelu (u, s)\n", "")
    a = spiky(32, 16, seed=2)
    weights = {"s": random(32, seed=3) + 2, "t": random(1), "w": random(32, 8, seed=4), "c": random(8)}
    check(model(text, a=a, **weights), {"x": random(128, 16)}, 1)


def test_a_shared_producer_weight_is_not_widened_for_both() -> None:
    text = """(float[N, 16] x, float[16, 16] a, float[16, 8] w) => (float[N, 8] y, float[N, 16] z) {
        u = MatMul (x, a)
        h = Gelu (u)
        y = MatMul (h, w)
        z = MatMul (x, a)
    }"""
    parsed = model(text, a=spiky(16, 16, seed=2), w=calm(random(16, 8, seed=4), 1))
    check(parsed, {"x": random(128, 16)}, 1, {"MatMul": 3, "Gelu": 1, "Gather": 1, "Mul": 1})


def test_even_inputs_are_left_alone() -> None:
    parsed = model(FFN, a=random(16, 32, seed=2), b=random(32, seed=3), w=random(32, 8, seed=4))
    moments = moments_of(parsed, {"x": random(4, 32, 16)})
    result = DisassembleChannels(moments, budget=0.25, multiple=4).run(parsed)
    assert result.changed == 0


def test_dead_inputs_are_left_alone() -> None:
    parsed = model(
        "(float[N, 16] x, float[16, 8] w) => (float[N, 8] y) { h = Relu (x)\n y = MatMul (h, w) }",
        w=random(16, 8),
    )
    moments = moments_of(parsed, {"x": np.full((64, 16), -1, np.float32)})
    assert DisassembleChannels(moments, **WIDE).run(parsed).changed == 0  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), st.integers(0, 60))
def test_the_counts_are_those_of_a_threshold(values: list[float], extra: int) -> None:
    largest = np.array(values, np.float32)
    copies = split_counts(largest, extra)
    assert copies.sum() == largest.size + extra
    assert (copies >= 1).all()
    theta = (largest / copies).max()
    # One copy fewer anywhere, and that channel would be above the threshold that was reached, or at it.
    split = copies > 1
    assert (largest[split] / (copies[split] - 1) >= theta * (1 - 1e-6)).all()
