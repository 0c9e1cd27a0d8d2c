"""The whole normalization on small models that combine what single passes are tested for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from pass_harness import FLOAT32, add_weights, assert_equal_outputs, count_ops, parse, random, run_onnxruntime

from bitwright.compiler.errors import InternalError
from bitwright.passes.contract import Pass, PassResult
from bitwright.passes.normalize import normalization_passes, normalize, run_to_fixed_point, specialize
from bitwright.passes.rewriting import fresh_names


def check(model: ir.Model, feeds: dict[str, np.ndarray]) -> None:
    before = run_onnxruntime(model, feeds)
    normalize(model)
    assert_equal_outputs(before, run_onnxruntime(model, feeds), FLOAT32)
    assert normalize(model).changed == 0


def test_a_model_of_2018_with_weights_as_inputs():
    text = """<ir_version: 3, opset_import: ["" : 8]>
    graph (float[N,8,5,5] x, float[16,8,3,3] w, float[16] g, int64[2] s) => (float[N,16] y) {
      a = Conv (x, w)
      b = BatchNormalization <epsilon = 0.01> (a, g, g, g, g)
      c = Dropout (b)
      d = GlobalAveragePool (c)
      y = Reshape (d, s)
    }"""
    model = parse(text)
    arrays = {"w": random(16, 8, 3, 3), "g": np.abs(random(16)) + 0.1, "s": np.array([-1, 16])}
    for value in model.graph.inputs:
        if value.name in arrays:  # stay inputs as well, as the file format demanded then
            value.const_value = ir.Tensor(arrays[value.name], name=value.name)
            model.graph.register_initializer(value)
    check(model, {"x": random(2, 8, 5, 5)})
    assert count_ops(model) == {"Conv": 1, "GlobalAveragePool": 1, "Reshape": 1}
    assert [v.name for v in model.graph.inputs] == ["x"]


def test_a_branch_chosen_by_a_constant_is_inlined_with_its_weights():
    text = """<ir_version: 8, opset_import: ["" : 16]>
    graph (float[N,2] x) => (float[N,2] y) <bool yes = {1}> {
      h = Relu (x)
      y = If (yes) <then_branch = t () => (float[N,2] a) {
          w = Constant <value = float[2,2] {1.0, 2.0, 3.0, 4.0}> ()  a = MatMul (h, w) },
        else_branch = e () => (float[N,2] b) { b = Neg (h) }>
    }"""
    model = parse(text)
    check(model, {"x": random(3, 2)})
    assert count_ops(model) == {"Relu": 1, "MatMul": 1}


def test_layers_inside_a_branch_are_folded_there():
    text = """<ir_version: 8, opset_import: ["" : 16]>
    graph (float[N,2,4,4] x, bool flag, float[3,2,1,1] w) => (float[N,3,4,4] y)
    <float[3] g = {1.0, 2.0, 0.5}> {
      y = If (flag) <then_branch = t () => (float[N,3,4,4] a) {
          c = Conv (x, w)  a = BatchNormalization (c, g, g, g, g) },
        else_branch = e () => (float[N,3,4,4] b) { d = Conv (x, w)  b = Identity (d) }>
    }"""
    for flag in (True, False):
        model = add_weights(parse(text), w=random(3, 2, 1, 1))
        check(model, {"x": random(2, 2, 4, 4), "flag": np.array(flag)})
        inner = [n.op_type for g in model.graphs() if g is not model.graph for n in g]
        assert inner == ["Conv", "Conv"]


def test_a_value_read_in_a_branch_is_not_folded_away():
    text = """<ir_version: 8, opset_import: ["" : 16]>
    graph (float[N,2,4,4] x, bool flag, float[3,2,1,1] w) => (float[N,3,4,4] y)
    <float[3] g = {1.0, 2.0, 0.5}> {
      c = Conv (x, w)
      y = If (flag) <then_branch = t () => (float[N,3,4,4] a) { a = BatchNormalization (c, g, g, g, g) },
        else_branch = e () => (float[N,3,4,4] b) { b = Neg (c) }>
    }"""
    for flag in (True, False):
        model = add_weights(parse(text), w=random(3, 2, 1, 1))
        check(model, {"x": random(2, 2, 4, 4), "flag": np.array(flag)})


def test_notes_say_which_pass_speaks():
    text = '<ir_version: 8, opset_import: ["" : 13]> graph (float[N] x) => (float[N] y) { y = Relu (x) }'
    assert normalize(parse(text)).notes == ("raise_opset: opset 13 raised to 21",)


def test_what_stays_dynamic_is_listed():
    text = """<ir_version: 10, opset_import: ["" : 21]>
    graph (float[N] x) => (int64[1,K] y) { y = NonZero (x) }"""
    result = specialize(parse(text), {"N": 4})
    assert result.notes == ("specialize: 'y' (NonZero) has no static shape",)


def test_every_pass_keeps_the_protocol_and_prints_its_options():
    passes = normalization_passes(opset=19)
    assert all(isinstance(step, Pass) for step in passes)
    assert "RaiseOpset(opset=19)" in [repr(step) for step in passes]


def test_passes_that_never_settle_are_our_bug():
    class Restless:
        name = "restless"

        def run(self, model: ir.Model) -> PassResult:
            return PassResult(model, 1)

    text = '<ir_version: 8, opset_import: ["" : 21]> graph (float[N] x) => (float[N] y) { y = Relu (x) }'
    with pytest.raises(InternalError, match="these still change it: restless"):
        run_to_fixed_point((Restless(),), parse(text))


def test_fresh_names_avoid_subgraphs():
    text = """<ir_version: 8, opset_import: ["" : 16]>
    graph (float[N] x, bool flag) => (float[N] y) {
      y = If (flag) <then_branch = t () => (float[N] a) { inner = Abs (x)  a = Neg (inner) },
                     else_branch = e () => (float[N] b) { b = Neg (x) }>
    }"""
    assert fresh_names(parse(text))("inner") == "inner_2"
