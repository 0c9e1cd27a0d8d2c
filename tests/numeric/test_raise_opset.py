"""Models of older opsets."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_harness import (
    FLOAT32,
    add_weights,
    assert_equal_outputs,
    check_pass,
    count_ops,
    parse,
    random,
    run_onnxruntime,
)

from bitwright.compiler.errors import ModelError
from bitwright.passes.raise_opset import RaiseOpset

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
X = {"x": random(1, 3, 4, 4)}


@pytest.mark.parametrize(
    ("opset", "body", "ops"),
    [
        (7, "y = Upsample <mode = 'nearest', scales = [1.0, 1.0, 2.0, 2.0]> (x)", "Resize"),
        (9, "y = Upsample <mode = 'linear'> (x, s)", "Resize"),
        (9, "y = Slice <axes = [1], starts = [0], ends = [2]> (x)", "Slice"),
        (10, "y = Pad <pads = [0,0,1,1,0,0,1,1], value = 0.5> (x)", "Pad"),
        (10, "y = Resize <mode = 'nearest'> (x, s)", "Resize"),
        (10, "y = Resize <mode = 'linear'> (x, d)", "Resize"),
        (10, "y = Resize <mode = 'nearest'> (x, d)", "Resize"),
        (10, "y = Clip <min = -0.5, max = 0.5> (x)", "Clip"),
        (7, "y = Dropout <ratio = 0.3> (x)", "Dropout"),
        (11, "y = Softmax (x)", "Softmax"),
        (11, "y = LogSoftmax <axis = 2> (x)", "LogSoftmax"),
        (11, "y = Unsqueeze <axes = [0]> (x)", "Unsqueeze"),
        (11, "y = ReduceSum <axes = [1], keepdims = 0> (x)", "ReduceSum"),
        (13, "y = ReduceL2 <axes = [2, 3]> (x)", "ReduceL2"),
        (11, "y, z = Split <axis = 1, split = [1, 2]> (x)", "Split"),
        (16, "y = HardSwish (x)", "HardSwish"),
    ],
)
def test_old_operators_keep_their_meaning(opset, body, ops):
    rank = {"Unsqueeze": 5, "ReduceSum": 3}.get(ops, 4)
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]>\n'
        f"graph (float[1,3,4,4] x) => (float[{','.join('abcdef'[:rank])}] y)"
        f"<float[4] s = {{1.0, 1.0, 2.0, 2.5}}, float[4] d = {{1.0, 1.0, 0.6, 0.5}}> {{ {body} }}"
    ).replace("'", '"')
    model = parse(text)
    before = run_onnxruntime(model, X)
    result = RaiseOpset(21).run(model)
    assert result.changed == 1 and model.opset_imports[""] == 21
    assert ops in count_ops(model)
    onnx.checker.check_model(ir.to_proto(model))
    assert_equal_outputs(before, run_onnxruntime(model, X), FLOAT32)
    assert RaiseOpset(21).run(model).changed == 0


def test_subgraphs_are_raised_with_the_model():
    text = """<ir_version: 8, opset_import: ["" : 11]>
    graph (float[N,4,4] x, bool flag) => (float[N,1,4] y) {
      y = If (flag) <then_branch = t () => (float[N,1,4] a) {
        s = Softmax (x)  a = ReduceSum <axes = [1]> (s) },
                     else_branch = e () => (float[N,1,4] b) { b = ReduceMax <axes = [1]> (x) }>
    }"""
    for flag in (True, False):
        check_pass(
            RaiseOpset(21),
            text,
            {"x": random(2, 4, 4), "flag": np.array(flag)},
            fires=1,
            ops={"If": 1},
            bound=FLOAT32,
        )


def test_weights_survive_the_opset_change_without_a_copy():
    text = """<ir_version: 8, opset_import: ["" : 13]>
    graph (float[N,64] x, float[64,64] w) => (float[N,64] y) { y = MatMul (x, w) }"""
    weight = random(64, 64)
    model = add_weights(parse(text), w=weight)
    check_pass(RaiseOpset(21), model, {"x": random(2, 64)}, fires=1, ops={"MatMul": 1})
    assert model.graph.initializers["w"].const_value.numpy() is weight


def test_a_newer_model_and_other_domains_stay():
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    graph (float[N,4] x) => (float[N,4] y) { y = com.microsoft.Gelu (x) }"""
    model = parse(text)
    assert RaiseOpset(15).run(model).changed == 0
    check_pass(RaiseOpset(21), model, {"x": random(2, 4)}, fires=1, ops={"Gelu": 1})
    assert model.opset_imports["com.microsoft"] == 1


def test_a_node_without_equivalent_is_named():
    text = """<ir_version: 8, opset_import: ["" : 13]>
    graph (float[N,4] x) => (float[N,4] y) { [odd] y = Rotary (x) }"""
    with pytest.raises(ModelError, match=r"^node 'odd': Rotary cannot be converted from opset 13 to 21: "):
        RaiseOpset(21).run(parse(text))


def test_a_resize_that_cannot_be_expressed_is_refused():
    text = """<ir_version: 8, opset_import: ["" : 10]>
    graph (float[1,1,4,4] x) => (float[1,1,A,B] y) <float[4] s = {1.0, 1.0, 2.0, 0.5}> {
      [up] y = Resize (x, s) }"""
    with pytest.raises(ModelError, match=r"^node 'up': a Resize of opset 10 that enlarges one axis"):
        RaiseOpset(21).run(parse(text))


def test_a_prehistoric_model_is_refused():
    text = '<ir_version: 3, opset_import: ["" : 6]> graph (float[N,4] x) => (float[N,4] y) { y = Relu (x) }'
    with pytest.raises(ModelError, match="opset 6 is older than 7"):
        RaiseOpset(21).run(parse(text))
