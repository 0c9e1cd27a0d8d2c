"""Dynamic int8: numpy references, the fused forms of ONNX Runtime, and the bias that its row form must not swallow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from pass_harness import add_weights, check_pass, count_ops, parse, random, run_onnxruntime

from bitwright.compiler.errors import InternalError, ModelError
from bitwright.passes.quantize_dynamic import Granularity, QuantizeDynamic
from bitwright.passes.remove_unused import RemoveUnused

GOLDEN = Path(__file__).parents[1] / "golden"
HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
K, N = 24, 10
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "row")


def int8_weight(*shape: int, axis: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    weight = random(*shape, seed=seed)
    over = tuple(k for k in range(len(shape)) if k != axis)
    scale = (np.abs(weight).max(axis=over, keepdims=True) / 127).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale.reshape(-1)


def linear(body: str, *, x: str = "float[B,S,24]", y: str = "float[B,S,10]", opset: int = 20) -> ir.Model:
    """A model around ``w``, a dequantized [24, 10] weight, with a bias ``c`` far larger than the products."""
    text = HEAD.replace("20", str(opset)) + (
        f"g ({x} x, int8[24,10] w8, float[10] sw, int8[10] zw, float[10] c) => ({y} y)\n"
        f"{{ w = DequantizeLinear<axis=1>(w8, sw, zw)\n{body} }}"
    )
    integers, scale = int8_weight(K, N, axis=1)
    bias = 50 * random(N, seed=2)
    return add_weights(parse(text), w8=integers, sw=scale, zw=np.zeros(N, np.int8), c=bias)


def reference(x: np.ndarray, granularity: Granularity) -> np.ndarray:
    """Integer products of quantized activations, in float64 behind the float32 quantization."""
    integers, scale = int8_weight(K, N, axis=1)
    if granularity == "row":
        step = np.maximum(np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127), np.float32(2.0**-100))
        steps = np.rint(x / step)
    else:
        low, high = np.float32(min(x.min(), 0)), np.float32(max(x.max(), 0))
        step = np.float32((high - low) / np.float32(255)) if high > low else np.float32(1)
        zero = np.rint(np.clip(-low / step, 0, 255))
        steps = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    return (steps.astype(np.float64) @ integers.astype(np.float64)) * step.astype(np.float64) * scale


def run_optimized(
    model: ir.Model, feeds: dict[str, np.ndarray], path: Path
) -> tuple[dict[str, np.ndarray], set[str]]:
    """Run with every graph optimization on; return the outputs and the operators that ONNX Runtime executes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    return outputs, {n.op_type for n in onnx.load(path).graph.node}


def quantized(model: ir.Model, granularity: Granularity) -> ir.Model:
    nodes = dict.fromkeys([n.name or "" for n in model.graph if n.op_type in ("MatMul", "Gemm")], granularity)
    QuantizeDynamic(nodes).run(model)
    RemoveUnused().run(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def rows(*shape: int) -> np.ndarray:
    """Rows of very different size, which one scale a tensor handles badly; the first row is zero."""
    x = random(*shape) * np.exp(2 * random(*shape[:-1], 1, seed=3))
    x[0] = 0 if x.ndim == 2 else x[0]
    x[..., 0, :] = 0
    return x.astype(np.float32)


FORMS = {
    "plain": ("[m] y = MatMul(x, w)", 0.0),
    "own bias": ("[m] p = MatMul(x, w)\ny = Add(p, c)", 1.0),
    "own bias first": ("[m] p = MatMul(x, w)\ny = Add(c, p)", 1.0),
    "bias behind an Identity": ("[m] p = MatMul(x, w)\nd = Identity(c)\ny = Add(p, d)", 1.0),
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5)])
def test_matmul_equals_the_integer_reference(
    form: str, granularity: Granularity, shape: tuple[int, int], tmp_path: Path
) -> None:
    body, factor = FORMS[form]
    model = linear(body)
    bias = factor * model.graph.initializers["c"].const_value.numpy()  # type: ignore[union-attr]
    x = rows(*shape, K) if shape != (1, 1) else random(1, 1, K)
    expected = reference(x, granularity) + bias
    quantized(model, granularity)
    # float32 roundings of the result only: a bias multiplied by the rows' scales is wrong by most of its size.
    bound = 4e-7 * float(np.abs(expected).max())
    plain = run_onnxruntime(model, {"x": x})["y"]
    optimized, _ = run_optimized(model, {"x": x}, tmp_path / "o.onnx")
    np.testing.assert_allclose(plain, expected, rtol=0, atol=bound)
    np.testing.assert_allclose(optimized["y"], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_gemm_with_alpha_beta_and_transposed_weight(granularity: Granularity, tmp_path: Path) -> None:
    integers, scale = int8_weight(K, N, axis=1)
    text = HEAD + (
        "g (float[M,24] x, int8[10,24] w8, float[10] sw, int8[10] zw, float[10] c) => (float[M,10] y)\n"
        "{ w = DequantizeLinear<axis=0>(w8, sw, zw)\n [m] y = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, c) }"
    )
    bias = random(N, seed=2)
    model = add_weights(
        parse(text), w8=np.ascontiguousarray(integers.T), sw=scale, zw=np.zeros(N, np.int8), c=bias
    )
    x = rows(7, K)
    expected = 0.5 * reference(x, granularity) + 2 * bias
    quantized(model, granularity)
    found, _ = run_optimized(model, {"x": x}, tmp_path / "o.onnx")
    np.testing.assert_allclose(found["y"], expected, rtol=0, atol=4e-7 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("granularity", "body", "operator"),
    [
        ("tensor", "[m] p = MatMul(x, w)\ny = Add(p, c)", "DynamicQuantizeMatMul"),
        ("row", "[m] p = MatMul(x, w)\ny = Add(p, c)", "MatMulIntegerToFloat"),
    ],
)
def test_onnxruntime_fuses_the_form(
    granularity: Granularity, body: str, operator: str, tmp_path: Path
) -> None:
    model = quantized(linear(body), granularity)
    _, operators = run_optimized(model, {"x": random(2, 3, K)}, tmp_path / "o.onnx")
    assert operator in operators
    assert not operators & {"MatMul", "Gemm", "MatMulInteger", "FusedMatMul"}


def test_a_row_of_small_values_keeps_its_precision() -> None:
    x = random(1, 4, K)
    x[0, 0] *= 1e4
    x[0, 3] = 0
    exact = x.astype(np.float64) @ (int8_weight(K, N, axis=1)[0] * int8_weight(K, N, axis=1)[1])
    by_row, by_tensor = (
        run_onnxruntime(quantized(linear("[m] y = MatMul(x, w)"), g), {"x": x})["y"]
        for g in ("row", "tensor")
    )
    size = np.abs(exact[0, 1]).max()
    # Eight bits of a row of its own: a step is 1/127 of its largest value, its rounding noise adds up over 24 products.
    assert np.abs(by_row[0, 1] - exact[0, 1]).max() < 0.03 * size
    assert np.abs(by_tensor[0, 1] - exact[0, 1]).max() > 0.3 * size
    assert (by_row[0, 3] == 0).all()


def test_nodes_that_read_one_tensor_share_its_quantization() -> None:
    body = "[a] p = MatMul(x, w)\n[b] q = MatMul(x, w)\ny = Mul(p, q)"
    assert count_ops(quantized(linear(body), "tensor"))["DynamicQuantizeLinear"] == 1
    ops = count_ops(quantized(linear(body), "row"))
    assert (ops["ReduceMax"], ops["QuantizeLinear"], ops["MatMul"]) == (1, 1, 2)


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_opset_and_the_contract_of_a_pass(opset: int, granularity: Granularity) -> None:
    model = linear("[m] p = MatMul(x, w)\nr = Relu(p)\ny = Add(r, c)", opset=opset)
    # Eight bits of the activations; the bias dominates the output's size.
    check_pass(QuantizeDynamic({"m": granularity}), model, {"x": random(2, 3, K)}, fires=1, bound=0.01)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_multiplies_unsigned_weights(group: int, bias: bool) -> None:
    integers, scale = int8_weight(8, 4 // group, 3, 3, axis=0)
    text = HEAD + (
        f"g (float[B,4,6,5] x, int8[8,{4 // group},3,3] w8, float[8] sw, int8[8] zw, float[8] c) =>"
        " (float[B,8,3,3] y)\n{ w = DequantizeLinear<axis=0>(w8, sw, zw)\n"
        f"[m] y = Conv<group={group}, pads=[1,1,1,1], strides=[2,2]>(x, w{', c' if bias else ''}) }}"
    )
    model = add_weights(parse(text), w8=integers, sw=scale, zw=np.zeros(8, np.int8), c=random(8, seed=2))
    # One scale for the whole input of about +-3: half a step is 0.4 % of its largest value, and the products average.
    check_pass(QuantizeDynamic({"m": "tensor"}), model, {"x": random(2, 4, 6, 5)}, fires=1, bound=0.02)
    assert count_ops(model)["ConvInteger"] == 1


def test_golden_forms() -> None:
    for granularity in GRANULARITIES:
        model = parse(
            HEAD + "g (float[S,2] x) => (float[S,2] y) <int8[2,2] w8={1,-2,3,4}, float[2] sw={0.5,0.25},"
            " int8[2] zw={0,0}, float[2] c={1.0,2.0}>\n"
            "{ w = DequantizeLinear<axis=1>(w8, sw, zw)\n[m] p = MatMul(x, w)\n[n] y = Add(p, c) }"
        )
        quantized(model, granularity)
        text = onnx.printer.to_text(ir.to_proto(model))
        assert text.strip() == (GOLDEN / f"dynamic_{granularity}.txt").read_text().strip()


def test_what_has_no_dynamic_form_is_refused() -> None:
    conv = HEAD + (
        "g (float[1,2,4,4] x) => (float[1,2,4,4] y) <int8[2,2,1,1] w8={1,2,3,4}, float s={0.5}, int8 z={0}>\n"
        "{ w = DequantizeLinear(w8, s, z)\n[m] y = Conv(x, w) }"
    )
    with pytest.raises(ModelError, match="no rows"):
        QuantizeDynamic({"m": "row"}).run(parse(conv))
    turned = HEAD + (
        "g (float[2,4] x) => (float[4,2] y) <int8[2,2] w8={1,2,3,4}, float s={0.5}, int8 z={0}>\n"
        "{ w = DequantizeLinear(w8, s, z)\n[m] y = Gemm<transA=1>(x, w) }"
    )
    with pytest.raises(ModelError, match="transposed activation"):
        QuantizeDynamic({"m": "tensor"}).run(parse(turned))
    by_input = HEAD + (
        "g (float[4,2] x) => (float[4,2] y) <int8[2,2] w8={1,2,3,4}, float[2] s={0.5,1.0}, int8[2] z={0,0}>\n"
        "{ w = DequantizeLinear<axis=0>(w8, s, z)\n[m] y = MatMul(x, w) }"
    )
    with pytest.raises(ModelError, match="output channels"):
        QuantizeDynamic({"m": "tensor"}).run(parse(by_input))
    plain = HEAD + "g (float[4,2] x) => (float[4,2] y) <float[2,2] w={1,2,3,4}>\n{ [m] y = MatMul(x, w) }"
    with pytest.raises(InternalError, match="not stored in 8-bit"):
        QuantizeDynamic({"m": "tensor"}).run(parse(plain))


def test_infinities_and_not_a_number_stay_in_their_row() -> None:
    x = random(1, 4, K)
    x[0, 1, 3], x[0, 2, 5] = np.inf, np.nan
    found = run_onnxruntime(quantized(linear("[m] y = MatMul(x, w)"), "row"), {"x": x})["y"]
    assert np.isfinite(found[0, [0, 3]]).all()
    assert not np.isfinite(found[0, 1]).any()


def test_a_table_that_is_dequantized_in_front_is_no_obstacle() -> None:
    text = HEAD + (
        "g (int64[S] i, int8[24,10] w8, float[10] sw, int8[10] zw, int8[5,24] t) => (float[S,10] y) <float s={0.1}>\n"
        "{ w = DequantizeLinear<axis=1>(w8, sw, zw)\n r = Gather(t, i)\n x = DequantizeLinear(r, s)\n"
        "[m] y = MatMul(x, w) }"
    )
    integers, scale = int8_weight(K, N, axis=1)
    table = (random(5, K, seed=4) * 40).astype(np.int8)
    model = add_weights(parse(text), w8=integers, sw=scale, zw=np.zeros(N, np.int8), t=table)
    # The table's steps are no multiple of the rows': eight bits of noise.
    check_pass(QuantizeDynamic({"m": "row"}), model, {"i": np.array([0, 3, 4])}, fires=1, bound=0.02)
