"""Clips in front of quantizers: integers stay in their range, whatever the type."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.passes.saturate_activations import SaturateActivations

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
net (float[4, 6] x) => (float[4, 6] y, float[4, 6] other)
<float s = {0.5}, KIND z = {ZERO}>
{
  NODE
  q = QuantizeLinear (r, s, z)
  y = DequantizeLinear (q, s, z)
  other = Abs (READ)
}
"""
X = np.linspace(-12, 12, 24, dtype=np.float32).reshape(4, 6)


def model_of(kind="uint8", zero=0, node="r = Relu (x)", read="x"):
    text = TEXT.replace("KIND", kind).replace("ZERO", str(zero)).replace("NODE", node).replace("READ", read)
    return ir.from_proto(onnx.parser.parse_model(text))


def outputs(model):
    return run(open_session(model, SessionConfig(optimize=False)), {"x": X})


@pytest.mark.parametrize(
    ("kind", "zero", "levels"),
    [("uint8", 0, (0, 15)), ("uint8", 3, (0, 15)), ("int8", -128, (-128, -113)), ("int8", 0, (-8, 7))],
)
@pytest.mark.parametrize("node", ["r = Relu (x)", "r = Neg (x)"])
@pytest.mark.parametrize("integers", [False, True])
def test_integers_stay_between_the_levels(kind, zero, levels, node, integers):
    model = model_of(kind, zero, node)
    before = outputs(model)
    result = SaturateActivations({"r": levels}, integers=integers).run(model)
    assert result.changed == 1
    after = outputs(model)
    low, high = ((level - zero) * 0.5 for level in levels)
    np.testing.assert_array_equal(after["y"], np.clip(before["y"], low, high))
    np.testing.assert_array_equal(after["other"], before["other"])
    assert after["y"].max() == high
    assert SaturateActivations({"r": levels}, integers=integers).run(model).changed == 0


def test_the_clip_takes_the_place_of_a_relu():
    model = model_of()
    SaturateActivations({"r": (0, 15)}).run(model)
    assert [n.op_type for n in model.graph] == ["Clip", "QuantizeLinear", "DequantizeLinear", "Abs"]


def test_a_relu_with_other_readers_stays():
    model = model_of(read="r")
    before = outputs(model)["other"]
    SaturateActivations({"r": (0, 15)}).run(model)
    assert "Relu" in [n.op_type for n in model.graph]
    np.testing.assert_array_equal(outputs(model)["other"], before)


def test_what_the_type_saturates_or_what_only_moves_is_left_alone():
    assert SaturateActivations({"r": (0, 255)}).run(model_of()).changed == 0
    assert SaturateActivations({"r": (0, 255)}, integers=True).run(model_of()).changed == 0
    assert SaturateActivations({"r": (0, 15)}, frozenset(["r"])).run(model_of()).changed == 0
