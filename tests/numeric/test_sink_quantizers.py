"""Quantizers in front of moved data are left out only where those behind it round alike."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.passes.sink_quantizers import SinkQuantizers

TEXT = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[2, 3, 4, 5] x) => (float[2, 4, 15] y)
<float s = {{0.05}}, uint8 z = {{120}}, float s2 = {{{last}}}, int64[3] shape = {{2, 4, 15}}>
{{
q1 = QuantizeLinear(x, s, z)
d1 = DequantizeLinear(q1, s, z)
t = Transpose<perm=[0, 2, 1, 3]>(d1)
q2 = QuantizeLinear(t, s, z)
d2 = DequantizeLinear(q2, s, z)
r = Reshape(d2, shape)
q3 = QuantizeLinear(r, s2, z)
y = DequantizeLinear(q3, s2, z)
}}
"""
# Values beyond the range, too: clipping commutes with moving as well.
X = {"x": np.random.default_rng(0).normal(0, 4, (2, 3, 4, 5)).astype(np.float32)}


def built(last: float) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT.format(last=last)))


@pytest.mark.parametrize(("last", "changed", "left"), [(0.05, 2, 1), (0.06, 1, 2)])
def test_rounding_once_is_rounding_twice_by_the_same_scale(last: float, changed: int, left: int) -> None:
    before, after = built(last), built(last)
    assert SinkQuantizers().run(after).changed == changed
    assert SinkQuantizers().run(after).changed == 0
    assert [node.op_type for node in after.graph].count("QuantizeLinear") == left
    # As the standard defines the operators: runtimes that move integers would compute the same.
    plain = SessionConfig(optimize=False)
    results = [run(open_session(model, plain), X)["y"] for model in (before, after)]
    assert np.array_equal(results[0], results[1])


def test_a_moved_value_that_others_read_unrounded_stays() -> None:
    text = TEXT.replace("=> (float[2, 4, 15] y)", "=> (float[2, 4, 15] y, float[2, 4, 3, 5] t)")
    model = ir.from_proto(onnx.parser.parse_model(text.format(last=0.06)))
    assert SinkQuantizers().run(model).changed == 0
