"""A layer's own error: what it adds to exact inputs, whatever went wrong before it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from bitwright.compiler.ort.layer_error import PERFECT_DB
from bitwright.compiler.ort.own_error import own_errors

CHAIN = """
<ir_version: 8, opset_import: ["" : 17]>
chain (float[2,6] x) => (float[2,6] y)
{
  a = MatMul(x, w1)
  b = MatMul(a, w2)
  c = MatMul(b, w3)
  y = Relu(c)
}
"""


def _model(weights: dict[str, np.ndarray]) -> ir.Model:
    proto = onnx.parser.parse_model(CHAIN)
    proto.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    return ir.from_proto(proto)


def _decibel(exact: np.ndarray, found: np.ndarray) -> float:
    exact, found = exact.astype(np.float64), found.astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


def test_errors_before_a_layer_do_not_count_against_it() -> None:
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal((6, 6)).astype(np.float32) for k in (1, 2, 3)}
    coarse = {**weights, "w1": weights["w1"] + 0.3, "w3": weights["w3"] + 0.01}
    x = rng.standard_normal((2, 6)).astype(np.float32)
    found = own_errors(_model(weights), _model(coarse), ["a", "b", "c"], [{"x": x}])
    a = x @ weights["w1"]
    b = a @ weights["w2"]
    assert found["b"] == PERFECT_DB  # its weight is untouched
    # ONNX Runtime and numpy may sum in another order: 1e-6 relative, which hardly moves a noise of 1e-2.
    assert found["a"] == pytest.approx(_decibel(a, x @ coarse["w1"]), abs=0.01)
    assert found["c"] == pytest.approx(_decibel(b @ weights["w3"], b @ coarse["w3"]), abs=0.01)


def test_tensors_that_only_one_model_has_are_left_out() -> None:
    weights = {f"w{k}": np.eye(6, dtype=np.float32) for k in (1, 2, 3)}
    sample = {"x": np.ones((2, 6), np.float32)}
    model = _model(weights)
    assert own_errors(model, model, ["nothing"], [sample]) == {}
    assert own_errors(model, model, ["a"], [sample]) == {"a": PERFECT_DB}


ROUNDED = """
<ir_version: 8, opset_import: ["" : 17]>
rounded (float[2,6] x) => (float[2,6] y)
{
  a = MatMul(x, w1)
  q = QuantizeLinear(a, scale, zero)
  d = DequantizeLinear(q, scale, zero)
  b = MatMul(d, w2)
  y = Relu(b)
}
"""
PLAIN = ROUNDED.replace(
    "  q = QuantizeLinear(a, scale, zero)\n  d = DequantizeLinear(q, scale, zero)\n", ""
).replace("MatMul(d", "MatMul(a")


def test_a_rounding_that_no_layer_reads_belongs_to_the_layer_that_writes() -> None:
    rng = np.random.default_rng(2)
    arrays = {f"w{k}": rng.standard_normal((6, 6)).astype(np.float32) for k in (1, 2)}
    models = [onnx.parser.parse_model(text) for text in (PLAIN, ROUNDED)]
    for model in models:
        model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in arrays.items())
    scale = {"scale": np.float32(0.5), "zero": np.int8(0)}
    models[1].graph.initializer.extend(
        numpy_helper.from_array(np.array(v), name) for name, v in scale.items()
    )
    exact, rounded = map(ir.from_proto, models)
    x = rng.standard_normal((2, 6)).astype(np.float32)
    a = x @ arrays["w1"]
    coarse = np.rint(a / 0.5) * 0.5
    reader = own_errors(exact, rounded, ["a", "b"], [{"x": x}])
    assert reader["a"] == PERFECT_DB
    assert reader["b"] == pytest.approx(_decibel(a @ arrays["w2"], coarse @ arrays["w2"]), abs=0.01)
    writer = own_errors(exact, rounded, ["a", "b"], [{"x": x}], unread=["a"])
    assert writer["b"] == PERFECT_DB
    assert writer["a"] == pytest.approx(_decibel(a, coarse), abs=0.01)


def test_the_last_layer_has_an_error_of_its_own() -> None:
    rng = np.random.default_rng(1)
    weights = {f"w{k}": rng.standard_normal((6, 6)).astype(np.float32) for k in (1, 2, 3)}
    coarse = {**weights, "w1": weights["w1"] + 0.3, "w3": weights["w3"] + 0.01}
    x = rng.standard_normal((2, 6)).astype(np.float32)
    found = own_errors(_model(weights), _model(coarse), ["b", "y"], [{"x": x}])
    b = x @ weights["w1"] @ weights["w2"]
    exact, got = (np.maximum(b @ w["w3"], 0) for w in (weights, coarse))
    assert found["y"] == pytest.approx(_decibel(exact, got), abs=0.01)
