"""A spelled-out Gelu becomes one operator, and nothing else does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from pass_harness import FLOAT32, check_pass, parse, random

from bitwright.passes.fuse_gelu import FuseGelu

HEAD = (
    '<ir_version: 10, opset_import: ["" : 20]>\ngraph (float[N,8] x) => (float[N,8] y)'
    " <float root = {1.4142135}, float inverse = {0.70710677}, float one = {1}, float half = {0.5},"
    " float two = {2}, float rounded = {1.41421}>\n"
)
EXACT_FORMS = {
    "exporter": "a = Div (x, root)\n b = Erf (a)\n c = Add (b, one)\n d = Mul (x, c)\n y = Mul (d, half)",
    "operands swapped": "a = Mul (inverse, x) b = Erf (a) c = Add (one, b) d = Mul (c, x) y = Mul (half, d)",
    "half first": "a = Div (x, root) b = Erf (a) c = Add (b, one) d = Mul (c, half) y = Mul (d, x)",
    "half of x": "h = Mul (x, half) a = Div (x, root) b = Erf (a) c = Add (b, one) y = Mul (h, c)",
    "x by two": "h = Div (x, two) a = Div (x, root) b = Erf (a) c = Add (b, one) y = Mul (c, h)",
    "five decimals": "a = Div (x, rounded) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)",
}
OTHERS = {
    "another argument": "a = Div (x, two) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)",
    "another summand": "a = Div (x, root) b = Erf (a) c = Add (b, two) d = Mul (x, c) y = Mul (d, half)",
    "another factor": "a = Div (x, root) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, two)",
    "another input": "z = Neg (x) a = Div (x, root) b = Erf (a) c = Add (b, one) d = Mul (z, c) y = Mul (d, half)",
    "erf squared": "a = Div (x, root) b = Erf (a) c = Add (b, b) d = Mul (x, c) y = Mul (d, half)",
    "x twice": "a = Div (x, root) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, x)",
    "no product": "a = Div (x, root) b = Erf (a) y = Add (b, one)",
    "inside is read": "a = Div (x, root) b = Erf (a) c = Add (b, one) d = Mul (x, c) e = Mul (d, half) y = Add (e, b)",
}


@pytest.mark.parametrize("body", EXACT_FORMS.values(), ids=EXACT_FORMS)
def test_spelled_out_forms(body):
    check_pass(
        FuseGelu(), HEAD + f"{{ {body} }}", {"x": 3 * random(5, 8)}, fires=1, ops={"Gelu": 1}, bound=FLOAT32
    )


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_other_functions_stay(body):
    check_pass(FuseGelu(), HEAD + f"{{ {body} }}", {"x": random(5, 8)}, fires=0)


def test_a_graph_output_inside_stays():
    text = HEAD.replace("(float[N,8] y)", "(float[N,8] y, float[N,8] d)") + f"{{ {EXACT_FORMS['exporter']} }}"
    check_pass(FuseGelu(), text, {"x": random(5, 8)}, fires=0)


def test_a_constant_that_a_caller_may_override_is_none():
    text = HEAD.replace("(float[N,8] x)", "(float[N,8] x, float half)").replace(", float half = {0.5}", "")
    feeds = {"x": random(5, 8), "half": np.array(0.7, np.float32)}
    check_pass(FuseGelu(), text + f"{{ {EXACT_FORMS['exporter']} }}", feeds, fires=0)


def test_an_older_opset_has_no_such_operator():
    text = HEAD.replace('"" : 20', '"" : 19') + f"{{ {EXACT_FORMS['exporter']} }}"
    check_pass(FuseGelu(), text, {"x": random(5, 8)}, fires=0)


def test_two_gelus_of_one_value():
    one = "a = Div (x, root) b = Erf (a) c = Add (b, one) d = Mul (x, c) u = Mul (d, half)"
    two = "e = Div (x, root) f = Erf (e) g = Add (f, one) h = Mul (x, g) v = Mul (h, half)"
    text = HEAD + f"{{ {one} {two} y = Add (u, v) }}"
    check_pass(FuseGelu(), text, {"x": random(5, 8)}, fires=2, ops={"Gelu": 2, "Add": 1}, bound=FLOAT32)


def test_onnx_runtime_fuses_nothing_behind_a_quantizer_by_itself(tmp_path):
    """Why the pass exists: a version of ONNX Runtime that fuses this form no longer needs it."""
    text = HEAD.replace("float root", "float s = {0.05}, uint8 z = {128}, float root")
    quantized = "q = QuantizeLinear (x, s, z) x1 = DequantizeLinear (q, s, z) "
    model = parse(text + "{ " + quantized + EXACT_FORMS["exporter"].replace("(x,", "(x1,") + " }")
    kinds = []
    for fuse in (False, True):
        if fuse:
            assert FuseGelu().run(model).changed == 1
        kinds.append(optimized_operators(model, tmp_path))
    assert "Erf" in kinds[0]
    assert {"Erf", "Div", "Mul"} & kinds[1] == set()
    assert "Gelu" in kinds[1]


def optimized_operators(model, tmp_path) -> set[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return {n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node}
