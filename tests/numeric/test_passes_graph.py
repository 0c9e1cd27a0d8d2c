"""Rewrites of the graph: functions, constants, data movement, names, shapes, types."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_harness import (
    add_weights,
    assert_equal_outputs,
    check_pass,
    count_ops,
    parse,
    random,
    run_onnxruntime,
)

from bitwright.compiler.errors import ModelError, UsageError
from bitwright.passes.convert_float16 import ConvertFloat16
from bitwright.passes.deduplicate_initializers import DeduplicateInitializers
from bitwright.passes.fix_dims import FixDims, dynamic_dims
from bitwright.passes.fold_constants import FoldConstants
from bitwright.passes.fold_shape_reads import FoldShapeReads
from bitwright.passes.freeze_default_inputs import FreezeDefaultInputs
from bitwright.passes.infer_shapes import InferShapes
from bitwright.passes.inline_functions import InlineFunctions
from bitwright.passes.lift_constants import LiftConstants
from bitwright.passes.merge_data_movement import MergeDataMovement
from bitwright.passes.name_nodes import NameNodes
from bitwright.passes.remove_identity import RemoveIdentity
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.sort_nodes import SortNodes

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'
X = {"x": random(1, 3, 4, 4)}


FUNCTIONS = """<ir_version: 10, opset_import: ["" : 21, "f" : 1]>
graph (float[N,4] x) => (float[N,4] y) { a = f.outer (x)  y = f.outer (a) }
<domain: "f", opset_import: ["" : 21, "f" : 1]> outer (p) => (q) { r = f.inner <k = 2.0> (p)  q = Relu (r) }
<domain: "f", opset_import: ["" : 21]> inner <k> (p) => (q) {
  c = Constant <value_float: float = @k> ()  q = Mul (p, c) }
"""


def test_nested_functions_are_inlined():
    ops = {"Constant": 2, "Mul": 2, "Relu": 2}
    model = parse(FUNCTIONS)
    check_pass(InlineFunctions(), model, {"x": random(2, 4)}, fires=2, ops=ops)
    assert not model.functions and "f" not in model.opset_imports


def test_functions_of_another_opset_are_refused():
    text = FUNCTIONS.replace('"f", opset_import: ["" : 21]', '"f", opset_import: ["" : 20]')
    with pytest.raises(ModelError, match="cannot be inlined"):
        InlineFunctions().run(parse(text))


def test_constants_become_initializers_in_subgraphs_too():
    text = (
        HEAD
        + """graph (float[N] x, bool flag) => (float[N] y) {
      c = Constant <value_floats = [2.0]> ()
      m = Mul (x, c)
      y = If (flag) <then_branch = t () => (float[N] a) {
        d = Constant <value_float = 3.0> ()  a = Add (m, d) },
                     else_branch = e () => (float[N] b) { b = Neg (m) }>
    }"""
    )
    check_pass(
        LiftConstants(), text, {"x": random(3), "flag": np.array(True)}, fires=2, ops={"Mul": 1, "If": 1}
    )


def test_inputs_with_defaults_become_constants():
    text = HEAD + "graph (float[N] x, float[1] w) => (float[N] y) <float[1] w = {2.0}> { y = Mul (x, w) }"
    model = parse(text)
    assert [v.name for v in model.graph.inputs] == ["x", "w"]
    result = check_pass(FreezeDefaultInputs(), model, {"x": random(3)}, fires=1, ops={"Mul": 1})
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert result.notes == ("inputs with a default value became constants: w",)


@pytest.mark.parametrize(
    ("body", "fires", "ops"),
    [
        ("a = Identity (x)\n y = Relu (a)", 1, {"Relu": 1}),
        ("a = Relu (x)\n y = Identity (a)", 1, {"Relu": 1}),
        ("y = Identity (x)", 0, {"Identity": 1}),
        ("a = Dropout (x)\n y = Relu (a)", 1, {"Relu": 1}),
        ("a = Cast <to = 1> (x)\n y = Relu (a)", 1, {"Relu": 1}),
        ("a = Cast <to = 11> (x)\n b = Cast <to = 1> (a)\n y = Relu (b)", 0, {"Cast": 2, "Relu": 1}),
        ("a = Transpose <perm = [0, 1, 2, 3]> (x)\n y = Relu (a)", 1, {"Relu": 1}),
        ("a = Transpose <perm = [0, 1, 3, 2]> (x)\n y = Relu (a)", 0, {"Transpose": 1, "Relu": 1}),
    ],
)
def test_nodes_without_effect(body, fires, ops):
    text = HEAD + f"graph (float[1,3,4,4] x) => (float[1,3,4,4] y) {{ {body} }}"
    check_pass(RemoveIdentity(), text, X, fires=fires, ops=ops)


def test_identity_keeps_names_of_outputs_and_branches():
    text = (
        HEAD
        + """graph (float[N] x, bool flag) => (float[N] y, float[N] z, float[N] w) {
      m = Relu (x)
      z = Identity (m)
      w = Identity (m)
      y = If (flag) <then_branch = t () => (float[N] a) { a = Identity (m) },
                     else_branch = e () => (float[N] b) { c = Neg (m)  b = Identity (c) }>
    }"""
    )
    for flag in (True, False):
        check_pass(
            RemoveIdentity(),
            text,
            {"x": random(3), "flag": np.array(flag)},
            fires=2,
            ops={"Relu": 1, "Identity": 1, "If": 1},
        )


def test_transposes_and_reshapes_merge():
    text = (
        HEAD
        + """graph (float[1,3,4,4] x) => (float[4,12] y) <int64[2] s = {12, 4}, int64[2] t = {4, -1}> {
      a = Transpose <perm = [0, 2, 3, 1]> (x)
      b = Transpose <perm = [0, 3, 1, 2]> (a)
      c = Reshape (b, s)
      y = Reshape (c, t)
    }"""
    )
    model = parse(text)
    check_pass(MergeDataMovement(), model, X, fires=2)
    before = run_onnxruntime(model, X)
    RemoveUnused().run(model)
    RemoveIdentity().run(model)
    assert count_ops(model) == {"Reshape": 1}
    assert_equal_outputs(before, run_onnxruntime(model, X), 0.0)


def test_a_reshape_that_copies_dimensions_is_left():
    text = (
        HEAD
        + """graph (float[1,3,4,4] x) => (float[12,4] y) <int64[2] s = {12, 4}, int64[2] t = {0, -1}> {
      c = Reshape (x, s)
      y = Reshape (c, t)
    }"""
    )
    check_pass(MergeDataMovement(), text, X, fires=0, ops={"Reshape": 2})


SHAPE_ARITHMETIC = """graph (float[2,3,N] x) => (float[6,M] y)
    <int64[1] i = {0}, int64 j = {1}, int64[1] k = {-1}> {
      s = Shape (x)
      a = Gather (s, i)
      b = Gather (s, j)
      c = Mul (a, b)
      t = Concat <axis = 0> (c, k)
      y = Reshape (x, t)
    }"""


def test_known_dimensions_are_read_at_compile_time():
    feeds = {"x": random(2, 3, 5)}
    model = parse(HEAD + SHAPE_ARITHMETIC)
    check_pass(FoldShapeReads(), model, feeds, fires=2, ops={"Shape": 1, "Mul": 1, "Concat": 1, "Reshape": 1})
    check_pass(FoldConstants(), model, feeds, fires=2, ops={"Shape": 1, "Reshape": 1})
    unknown = HEAD + SHAPE_ARITHMETIC.replace("float[2,3,N] x", "float[2,D,N] x")
    check_pass(FoldShapeReads(), unknown, feeds, fires=1)


def test_shape_arithmetic_folds_where_the_shape_is_static():
    text = HEAD + SHAPE_ARITHMETIC.replace("float[2,3,N] x", "float[2,3,5] x").replace(
        "Gather (s", "Gather <axis = 0> (s"
    )
    check_pass(FoldConstants(), text, {"x": random(2, 3, 5)}, fires=3, ops={"Constant": 2, "Reshape": 1})


def test_quantizers_of_weights_are_never_folded():
    text = (
        HEAD
        + """graph (float[N,2] x) => (float[N,2] y)
    <int8[2,2] w = {1, -2, 3, 4}, float s = {0.5}, int8 z = {0}, float[2,2] f = {1.0, 2.0, 3.0, 4.0}> {
      d = DequantizeLinear (w, s, z)
      q = QuantizeLinear (f, s, z)
      e = DequantizeLinear (q, s, z)
      a = MatMul (x, d)
      y = MatMul (a, e)
    }"""
    )
    ops = {"DequantizeLinear": 2, "QuantizeLinear": 1, "MatMul": 2}
    check_pass(FoldConstants(), text, {"x": random(3, 2)}, fires=0, ops=ops)


def test_folding_respects_its_budget():
    text = (
        HEAD
        + """graph (float[N] x) => (float[M,N] y) <int64[2] s = {1000, 1}, float[1] c = {2.0}> {
      e = Expand (c, s)
      y = Mul (e, x)
    }"""
    )
    feeds = {"x": random(3)}
    check_pass(FoldConstants(budget_bytes=100), text, feeds, fires=0, ops={"Expand": 1, "Mul": 1})
    check_pass(FoldConstants(budget_bytes=4000), text, feeds, fires=1, ops={"Mul": 1})


@pytest.mark.parametrize(("reader", "fires"), [("g = Gather (w, ids)", 0), ("g = Gather (v, ids)", 1)])
def test_a_tied_table_is_not_transposed_at_compile_time(reader, fires):
    text = (
        HEAD
        + f"""graph (int64[T] ids, float[7,3] w, float[7,3] v) => (float[T,7] y) {{
      {reader}
      t = Transpose <perm = [1, 0]> (w)
      y = MatMul (g, t)
    }}"""
    )
    model = add_weights(parse(text), w=random(7, 3), v=random(7, 3, seed=1))
    check_pass(FoldConstants(), model, {"ids": np.array([0, 6])}, fires=fires)


def test_equal_initializers_are_stored_once():
    text = (
        HEAD
        + """graph (float[N,2] x) => (float[N,2] y)
    <float[2] a = {1.0, 0.0}, float[2] b = {1.0, 0.0}, float[2] c = {1.0, -0.0}, float[1,2] d = {1.0, 0.0}> {
      p = Add (x, a)
      q = Add (p, b)
      r = Div (q, c)
      y = Add (r, d)
    }"""
    )
    model = parse(text)
    check_pass(DeduplicateInitializers(), model, {"x": random(3, 2)}, fires=1)
    assert list(model.graph.initializers) == ["a", "c", "d"], "-0.0 and another shape are not equal"


def test_unused_parts_go_and_inputs_stay():
    text = (
        HEAD
        + """graph (float[N] x, float[N] u) => (float[N] y) <float[1] w = {1.0}> {
      a = Relu (u)
      b = Abs (a)
      y = Neg (x)
    }"""
    )
    model = parse(text)
    check_pass(RemoveUnused(), model, {"x": random(2), "u": random(2)}, fires=3, ops={"Neg": 1})
    assert [v.name for v in model.graph.inputs] == ["x", "u"]


def test_nodes_are_sorted_and_keep_their_order():
    text = HEAD + "graph (float[N] x) => (float[N] y) { b = Abs (x)  a = Relu (x)  y = Add (a, b) }"
    model = parse(text)
    last = list(model.graph)[-1]
    model.graph.remove(last)
    model.graph.insert_before(next(iter(model.graph)), last)
    assert SortNodes().run(model).changed == 1
    assert [n.op_type for n in model.graph] == ["Abs", "Relu", "Add"]
    check_pass(SortNodes(), model, {"x": random(2)}, fires=0)


def test_names_become_unique_over_subgraphs():
    text = (
        HEAD
        + """graph (float[N] x, bool flag) => (float[N] y) {
      [n] a = Relu (x)
      b = Neg (a)
      y = If (flag) <then_branch = t () => (float[N] c) { c = Abs (b) },
                     else_branch = e () => (float[N] d) { [n] d = Exp (b) }>
    }"""
    )
    model = parse(text)
    check_pass(NameNodes(), model, {"x": random(2), "flag": np.array(False)}, fires=4)
    names = [node.name for graph in model.graphs() for node in graph]
    assert len(set(names)) == len(names) == 5 and all(names)
    assert names[0] == "n"


def test_optional_outputs_that_nobody_reads_stay_unnamed():
    text = HEAD + (
        "graph (float[T,N,2] x, float[1,4,2] w, float[1,4,1] r) => (float[1,N,1] h)"
        ' { "", h = LSTM <hidden_size = 1> (x, w, r) }'
    )
    model = add_weights(parse(text), w=random(1, 4, 2), r=random(1, 4, 1))
    check_pass(NameNodes(), model, {"x": random(3, 2, 2)}, fires=1)


def test_shapes_are_inferred_with_weights_set_aside():
    text = (
        HEAD + "graph (float[N,64] x, float[64,32] w) => (float[N,32] y) { a = MatMul (x, w)  y = Relu (a) }"
    )
    model = add_weights(parse(text), w=random(64, 32))
    check_pass(InferShapes(), model, {"x": random(2, 64)}, fires=1)
    shape = next(iter(model.graph)).outputs[0].shape
    assert [getattr(d, "value", d) for d in shape] == ["N", 32]


def test_known_shapes_stay_where_inference_fails():
    text = """<ir_version: 10, opset_import: ["" : 21, "acme" : 1]>
    graph (float[N,4] x) => (float[N,4] y) <float[N,4] a> { a = acme.Gate (x)  y = Relu (a) }"""
    model = parse(text)
    assert InferShapes().run(model).changed == 0
    assert len(next(iter(model.graph)).outputs[0].shape) == 2


def test_dimensions_are_fixed_by_name_and_by_position():
    text = (
        HEAD
        + "graph (float[N,T] x, float[?,4] u) => (float[N,T] y, float[M,4] v) { y = Relu (x)  v = Abs (u) }"
    )
    model = parse(text)
    assert dynamic_dims(model) == ("N", "T", "u:0")
    check_pass(FixDims({"N": 2, "T": 3, "u:0": 5}), model, {"x": random(2, 3), "u": random(5, 4)}, fires=3)
    assert dynamic_dims(model) == ()


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        (
            {"batch": 1},
            "dimension batch=1: 'batch' is no dynamic dimension of the model's inputs\n  fix: known: N, T",
        ),
        ({"n": 1, "T": 0}, "dimension n=1: 'n' is no dynamic dimension"),
        ({"T": 0}, "dimension T=0: a dimension must be at least 1\n  fix: give a positive integer"),
    ],
)
def test_unknown_dimensions_are_refused(dims, message):
    model = parse(HEAD + "graph (float[N,T] x) => (float[N,T] y) { y = Relu (x) }")
    with pytest.raises(UsageError) as caught:
        FixDims(dims).run(model)
    assert caught.value.message.startswith(message)


HALF_ROUNDING = (
    2e-3  # two float16 roundings (2**-11 each) that float32 does not make, relative to the largest value
)


def test_a_float16_model_is_computed_in_float32():
    text = (
        HEAD
        + """graph (float16[N,4] x, float[4,4] w, bool flag) => (float16[N,4] y, float16[N,4] h) {
      v = Cast <to = 10> (w)
      c = ConstantOfShape <value = float16[1] {16384}> (s)
      a = MatMul (x, v)
      h = Mul (a, c)
      b = Cast <to = 1> (h)
      d = Relu (b)
      e = Cast <to = 10> (d)
      y = If (flag) <then_branch = t () => (float16[N,4] p) { p = Neg (e) },
                     else_branch = f () => (float16[N,4] q) { q = Cast <to = 10> (d) }>
    }""".replace(
            "=> (float16[N,4] y, float16[N,4] h) {",
            "=> (float16[N,4] y, float16[N,4] h) <int64[1] s = {4}> {",
        )
    )
    for flag in (True, False):
        model = add_weights(parse(text), w=random(4, 4))
        InferShapes().run(model)
        feeds = {"x": random(2, 4).astype(np.float16), "flag": np.array(flag)}
        before = run_onnxruntime(model, feeds)
        assert ConvertFloat16().run(model).changed > 0
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        assert_equal_outputs(before, run_onnxruntime(model, feeds), HALF_ROUNDING)
        inner = [
            o.dtype for g in model.graphs() for n in g for o in n.outputs if o not in model.graph.outputs
        ]
        assert ir.DataType.FLOAT16 not in inner
        assert ConvertFloat16().run(model).changed == 0


def test_an_unknown_float16_operator_is_refused():
    text = """<ir_version: 10, opset_import: ["" : 21, "acme" : 1]>
    graph (float16[N] x) => (float16[N] y) <float16[N] a> { a = Relu (x)  [gate] y = acme.Gate (a) }"""
    with pytest.raises(ModelError, match=r"node 'gate': operator acme\.Gate works on 16-bit floats"):
        ConvertFloat16().run(parse(text))
