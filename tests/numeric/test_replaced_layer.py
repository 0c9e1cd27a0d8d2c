"""Single layers in float again where there is no quantizer to leave out, and outputs that only their kernel rounds."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from bitwright.compiler.ort.layer_error import PERFECT_DB
from bitwright.compiler.ort.replaced_layer import compute_in_float, pass_quantizer
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.ort.what_if import what_if_float

FLOAT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2,6] x) => (float[2,6] y)
{
  [first] a = MatMul(x, w1)
  [bias] b = Add(a, b1)
  [act] c = Relu(b)
  [last] y = MatMul(c, w2)
}
"""
# Products of integers: nothing that reads a DequantizeLinear is left of the layers, nor is the sum without the bias.
QUANTIZED = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2,6] x) => (float[2,6] y)
{
  xq, xs, xz = DynamicQuantizeLinear(x)
  [first] p = MatMulInteger(xq, q1, xz)
  pf = Cast<to=1>(p)
  xsw = Mul(xs, s)
  pm = Mul(pf, xsw)
  b = Add(pm, b1)
  [act] c = Relu(b)
  cq, cs, cz = DynamicQuantizeLinear(c)
  [last] r = MatMulInteger(cq, q2, cz)
  rf = Cast<to=1>(r)
  csw = Mul(cs, s)
  y = Mul(rf, csw)
}
"""
STEP = np.float32(0.25)  # weights in a few steps: the rounding is coarse and easily seen
RNG = np.random.default_rng(0)
W = {name: RNG.standard_normal((6, 6)).astype(np.float32) for name in ("w1", "w2")}
B = RNG.standard_normal(6).astype(np.float32)
X = {"x": RNG.standard_normal((2, 6)).astype(np.float32)}


def model(text: str, **arrays: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    return ir.from_proto(proto)


def pair() -> tuple[ir.Model, ir.Model]:
    integers = {f"q{k}": np.rint(W[f"w{k}"] / STEP).astype(np.int8) for k in (1, 2)}
    return model(FLOAT, **W, b1=B), model(QUANTIZED, **integers, b1=B, s=STEP)


def test_both_layers_in_float_give_the_float_model() -> None:
    exact, quantized = pair()
    assert compute_in_float(quantized, exact, "first") and compute_in_float(quantized, exact, "last")
    onnx.checker.check_model(ir.to_proto(quantized), full_check=True)
    found = run(open_session(quantized), X)
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"], run(open_session(exact), X)["y"], rtol=1e-5, atol=1e-5)


def test_one_layer_is_computed_from_what_the_quantized_model_has() -> None:
    exact, quantized = pair()
    assert compute_in_float(quantized, exact, "last")
    before = quantized.clone()
    before.graph.outputs[0] = next(o for n in before.graph for o in n.outputs if o.name == "c")
    hidden = run(open_session(before), X)["c"]
    np.testing.assert_allclose(run(open_session(quantized), X)["y"], hidden @ W["w2"], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_taken_back_alone_is_left_out() -> None:
    exact, quantized = pair()
    for value in (o for n in quantized.graph for o in n.outputs if o.name in ("b", "c")):
        value.name = f"{value.name}_else"
    assert not compute_in_float(quantized.clone(), exact, "first")
    assert not compute_in_float(quantized.clone(), exact, "nothing")
    assert what_if_float(exact, quantized, ["first"], [X]) == ()


def test_layers_without_quantizers_are_measured_as_a_whole() -> None:
    exact, quantized = pair()
    found = what_if_float(exact, quantized, ["first", "last"], [X])
    assert {f.node for f in found} == {"first", "last"}
    assert all(f.inputs_db is None and f.weights_db is None for f in found)
    # Weights in steps of a quarter dominate: without those of one of two layers less noise is left.
    assert found[0].gain_db > 0.5


OUTPUT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2,6] x) => (float[2,6] y)
{
  dx = DequantizeLinear(qx, fine, zero)
  qx = QuantizeLinear(x, fine, zero)
  [first] a = MatMul(dx, w1)
  qa = QuantizeLinear(a, coarse, zero)
  da = DequantizeLinear(qa, coarse, zero)
  [act] y = Tanh(da)
}
"""
LINES = OUTPUT.splitlines()
LINES[4], LINES[5] = LINES[5], LINES[4]
EXACT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[2,6] x) => (float[2,6] y)
{
  [first] a = MatMul(x, w1)
  [act] y = Tanh(a)
}
"""


def test_an_output_that_only_the_kernel_rounds_is_to_blame() -> None:
    scales = {"fine": np.float32(0.02), "coarse": np.float32(0.8), "zero": np.int8(0)}
    quantized = model("\n".join(LINES), w1=W["w1"], **scales)  # type: ignore[arg-type]
    exact = model(EXACT, w1=W["w1"])
    (blind,) = what_if_float(exact, quantized, ["first"], [X])
    (seeing,) = what_if_float(exact, quantized, ["first"], [X], unread={"first": "a"})
    assert blind.gain_db < 3 and blind.output_db is None  # the coarse rounding behind it stays
    assert seeing.output_db is not None and seeing.output_db > 20  # 0.8 against 0.02: 32 dB
    assert seeing.gain_db == pytest.approx(PERFECT_DB - _base(exact, quantized), abs=1e-6)


def _base(exact: ir.Model, quantized: ir.Model) -> float:
    a, b = (run(open_session(m), X)["y"].astype(np.float64) for m in (exact, quantized))
    return float(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))


def test_nothing_is_passed_where_nothing_is_quantized() -> None:
    exact = model(EXACT, w1=W["w1"])
    assert not pass_quantizer(exact, "a") and not pass_quantizer(exact, "nothing")
