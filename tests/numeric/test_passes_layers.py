"""Rewrites of layers: BatchNormalization, bias, canonical weights, pooling."""

from __future__ import annotations

import numpy as np
import pytest
from pass_harness import EXACT, FLOAT32, add_weights, check_pass, parse, random

from bitwright.passes.canonicalize_linear import CanonicalizeLinear
from bitwright.passes.fold_batchnorm import FoldBatchNorm
from bitwright.passes.fold_conv_add import FoldConvAdd
from bitwright.passes.mean_to_pool import MeanToPool

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
NORM = (
    "<float[4] g={1.5,-0.5,2.0,0.1}, float[4] b={0.1,0.2,-0.3,0.0},"
    " float[4] m={0.5,-1.0,0.0,2.0}, float[4] v={1.0,0.3,4.0,0.01}>"
)


def with_norm(layer: str, weight: tuple[int, ...], *, extra: str = "", x: str = "[N,3,5,5]") -> str:
    shape = ",".join(map(str, weight))
    return (
        HEAD + f"graph (float{x} x, float[{shape}] w{extra}) => (float y) {NORM}\n"
        f"{{ a = {layer}\n y = BatchNormalization <epsilon = 0.001> (a, g, b, m, v) }}"
    )


def ranked(text: str, rank: int) -> str:
    """The parser reads ``float y`` as a scalar: give the output its rank."""
    return text.replace("=> (float y)", f"=> (float[{','.join('abcdef'[:rank])}] y)")


@pytest.mark.parametrize(
    ("layer", "weight", "extra", "x"),
    [
        ("Conv (x, w)", (4, 3, 3, 3), "", (2, 3, 5, 5)),
        ("Conv (x, w, c)", (4, 3, 3, 3), ", float[4] c", (2, 3, 5, 5)),
        ("Conv <group = 4> (x, w, c)", (4, 1, 3, 3), ", float[4] c", (2, 4, 5, 5)),
        ("ConvTranspose (x, w)", (3, 4, 2, 2), "", (2, 3, 5, 5)),
        ("ConvTranspose <group = 2> (x, w, c)", (6, 2, 2, 2), ", float[4] c", (2, 6, 5, 5)),
        ("Gemm <alpha = 0.5, beta = 2.0> (x, w, c)", (3, 4), ", float[4] c", (2, 3)),
        ("Gemm <transB = 1> (x, w, c)", (4, 3), ", float[1] c", (2, 3)),
        ("Gemm (x, w)", (3, 4), "", (2, 3)),
    ],
)
def test_batchnorm_folds_into_the_layer_in_front(layer, weight, extra, x):
    dims = "[" + ",".join(["N", *map(str, x[1:])]) + "]"
    model = parse(ranked(with_norm(layer, weight, extra=extra, x=dims), len(x)))
    bias = {"c": random(1 if "[1]" in extra else 4, seed=3)} if extra else {}
    add_weights(model, w=random(*weight, seed=1), **bias)
    op = layer.split()[0]
    check_pass(FoldBatchNorm(), model, {"x": random(*x)}, fires=1, ops={op: 1}, bound=FLOAT32)


@pytest.mark.parametrize(
    "body",
    [
        "a = Relu (x)\n y = BatchNormalization (a, g, b, m, v)",  # nothing to fold into
        "a = Conv (x, w)\n y = BatchNormalization (a, g, b, m, v)\n z = Relu (a)",
        "a = Conv (x, w)\n h = Abs (g)\n y = BatchNormalization (a, h, b, m, v)",  # computed parameters
    ],
)
def test_batchnorm_stays_and_says_why(body):
    outputs = "float[N,4,5,5] y" + (", float[N,4,5,5] z" if "z =" in body else "")
    text = HEAD + f"graph (float[N,4,5,5] x, float[4,4,1,1] w) => ({outputs}) {NORM} {{ {body} }}"
    model = add_weights(parse(text), w=random(4, 4, 1, 1))
    result = check_pass(FoldBatchNorm(), model, {"x": random(1, 4, 5, 5)}, fires=0)
    assert "stays, no foldable layer" in result.notes[0]


def test_two_layers_that_share_a_weight_get_their_own():
    text = (
        HEAD + f"graph (float[N,4,5,5] x, float[4,4,1,1] w) => (float[N,4,5,5] y, float[N,4,5,5] z) {NORM}\n"
        "{ p = Conv (x, w)\n q = Conv (p, w)\n y = BatchNormalization (q, g, b, m, v)\n z = Relu (p) }"
    )
    model = add_weights(parse(text), w=random(4, 4, 1, 1))
    check_pass(
        FoldBatchNorm(), model, {"x": random(1, 4, 5, 5)}, fires=1, ops={"Conv": 2, "Relu": 1}, bound=FLOAT32
    )


@pytest.mark.parametrize(
    ("constant", "fires"),
    [((1, 4, 1, 1), 1), ((4, 1, 1), 1), ((1,), 1), ((), 1), ((5,), 0), ((1, 4, 5, 5), 0), ((2, 4, 1, 1), 0)],
)
@pytest.mark.parametrize("order", ["a, c", "c, a"])
def test_conv_add(constant, fires, order):
    dims = "[" + ",".join(map(str, constant)) + "]" if constant else ""
    text = (
        HEAD
        + f"graph (float[N,3,5,5] x, float[4,3,1,1] w, float[4] b, float{dims} c) => (float[N,4,5,5] y)\n"
        f"{{ a = Conv (x, w, b)\n y = Add ({order}) }}"
    )
    model = add_weights(parse(text), w=random(4, 3, 1, 1), b=random(4, seed=2), c=random(*constant, seed=3))
    ops = {"Conv": 1} if fires else {"Conv": 1, "Add": 1}
    check_pass(FoldConvAdd(), model, {"x": random(2, 3, 5, 5)}, fires=fires, ops=ops, bound=FLOAT32)


@pytest.mark.parametrize(
    "attributes", ["transB = 1", "alpha = 0.5, beta = 2.0", "transA = 1", "transA=1, transB=1, alpha=3.0"]
)
@pytest.mark.parametrize("bias", [(4,), (1, 4), (1,), (2, 4), (2, 1)])
def test_gemm_takes_one_form(attributes, bias):
    w = (4, 3) if "transB" in attributes else (3, 4)
    x = (3, 2) if "transA" in attributes else (2, 3)
    text = (
        HEAD + f"graph (float[{x[0]},{x[1]}] x, float[{w[0]},{w[1]}] w, float[{','.join(map(str, bias))}] c)"
        f" => (float[2,4] y) {{ y = Gemm <{attributes}> (x, w, c) }}"
    )
    model = add_weights(parse(text), w=random(*w), c=random(*bias, seed=1))
    check_pass(CanonicalizeLinear(), model, {"x": random(*x, seed=2)}, fires=1, bound=FLOAT32)
    gemm = next(n for n in model.graph if n.op_type == "Gemm")
    assert not gemm.attributes
    assert tuple(gemm.inputs[1].shape) == (3, 4)
    assert tuple(gemm.inputs[2].shape) == ((4,) if bias in [(4,), (1, 4), (1,)] else bias)


def test_tied_gemm_weights_are_transposed_once():
    text = HEAD + (
        "graph (float[2,3] x, float[3,3] w) => (float[2,3] y)"
        " { a = Gemm <transB=1> (x, w) y = Gemm <transB=1> (a, w) }"
    )
    model = add_weights(parse(text), w=random(3, 3))
    check_pass(CanonicalizeLinear(), model, {"x": random(2, 3, seed=2)}, fires=2, bound=FLOAT32)
    first, second = (n.inputs[1] for n in model.graph)
    assert first is second


@pytest.mark.parametrize("head", ["y = Gemm <transB = 1> (e, w)", "t = Transpose (w)\n y = MatMul (e, t)"])
def test_an_embedding_table_stays_tied_to_the_output_layer(head):
    text = HEAD + f"graph (int64[T] ids, float[7,3] w) => (float[T,7] y) {{ e = Gather (w, ids)\n {head} }}"
    model = add_weights(parse(text), w=random(7, 3))
    result = check_pass(CanonicalizeLinear(), model, {"ids": np.array([1, 6, 0])}, fires=0)
    assert "'w' is shared" in result.notes[0]


def test_matmul_reads_the_transposed_weight():
    text = (
        HEAD
        + "graph (float[N,3] x, float[7,3] w) => (float[N,7] y) { t = Transpose (w)\n y = MatMul (x, t) }"
    )
    model = add_weights(parse(text), w=random(7, 3))
    check_pass(CanonicalizeLinear(), model, {"x": random(2, 3)}, fires=1)
    assert tuple(next(n for n in model.graph if n.op_type == "MatMul").inputs[1].shape) == (3, 7)


@pytest.mark.parametrize(
    ("call", "shape", "ops"),
    [
        ("ReduceMean <keepdims = 1> (x, a)", "[N,3,1,1]", {"GlobalAveragePool": 1}),
        ("ReduceMean <keepdims = 0> (x, a)", "[N,3]", {"GlobalAveragePool": 1, "Squeeze": 1}),
    ],
)
@pytest.mark.parametrize("axes", ["2, 3", "-1, -2"])
def test_spatial_mean_becomes_a_pool(call, shape, ops, axes):
    text = HEAD + f"graph (float[N,3,4,5] x) => (float{shape} y) <int64[2] a = {{{axes}}}> {{ y = {call} }}"
    check_pass(MeanToPool(), text, {"x": random(2, 3, 4, 5)}, fires=1, ops=ops, bound=FLOAT32)


@pytest.mark.parametrize(("rank", "axes"), [("[N,3,4,5]", "1, 2"), ("[N,3,4,5,6]", "2, 3")])
def test_other_means_stay(rank, axes):
    dims = [int(d) if d.isdigit() else 2 for d in rank[1:-1].split(",")]
    out = "[" + ",".join("abcde"[: len(dims)]) + "]"
    text = (
        HEAD
        + f"graph (float{rank} x) => (float{out} y) <int64[2] a = {{{axes}}}> {{ y = ReduceMean (x, a) }}"
    )
    check_pass(MeanToPool(), text, {"x": random(*dims)}, fires=0, bound=EXACT)
