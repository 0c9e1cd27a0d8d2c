"""Malformed connections, inputs and names of a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from bitwright.compiler.ingest.model_reader import read_model

from . import build
from .refusals import accept, refuse


def test_cycle(tmp_path):
    text = "g (float[2] x) => (float[2] y) { [a] p = Add (x, q) [b] q = Relu (p) [c] y = Relu (q) }"
    refuse(build.parsed(text), tmp_path, "node 'a'", "cycle of 2 nodes", "'b'")


def test_unsorted_nodes_are_sorted(tmp_path):
    text = "g (float[2] x) => (float[2] y) { [c] y = Relu (q) [b] q = Neg (p) [a] p = Abs (x) }"
    model, warnings = accept(build.parsed(text), tmp_path)
    assert [n.name for n in model.graph] == ["a", "b", "c"]
    assert len(warnings) == 1 and "topological order" in warnings[0]


def test_dangling_input(tmp_path):
    model = build.net()
    model.graph.node[1].input[0] = "nowhere"
    refuse(model, tmp_path, "node 'relu1'", "'nowhere'")


def test_dangling_input_in_a_body(tmp_path):
    model = build.nested_if(1)
    model.graph.node[0].attribute[0].g.node[0].CopyFrom(
        onnx.helper.make_node("Relu", ["nowhere"], ["o0"], name="inner")
    )
    refuse(model, tmp_path, "node 'inner'", "'nowhere'", "then_branch")


def test_dangling_output(tmp_path):
    model = build.net()
    model.graph.output[0].name = "nowhere"
    refuse(model, tmp_path, "output 'nowhere'")


def test_duplicate_output_name(tmp_path):
    model = build.net()
    model.graph.node[1].output[0] = "c"
    refuse(model, tmp_path, "tensor 'c'", "node 'conv1'", "node 'relu1'")


def test_node_output_that_is_an_initializer_or_input(tmp_path):
    for name, source in (("w", "an initializer"), ("x", "a graph input")):
        model = build.net()
        model.graph.node[0].output[0] = name
        refuse(model, tmp_path, f"tensor '{name}'", source, "node 'conv1'")


def test_duplicate_initializer(tmp_path):
    model = build.net()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 3, 3, 3), np.float32), "w"))
    refuse(model, tmp_path, "tensor 'w'", "two initializers")


def test_node_names_become_unique(tmp_path):
    text = """g (float[2] x) => (float[2] y)
    {
      [same] a = Relu (x) b = Relu (a) [same_2] c = Neg (b)
      [same] d = Abs (c) [Abs_5] e = Abs (d) y = Abs (e)
    }"""
    model, warnings = accept(build.parsed(text), tmp_path)
    assert [n.name for n in model.graph] == ["same", "Relu_1", "same_2", "same_3", "Abs_5", "Abs_5_2"]
    assert warnings == ()
    again = read_model(build.write(ir.to_proto(model), tmp_path)).model
    assert [n.name for n in again.graph] == [n.name for n in model.graph]


def test_unnamed_optional_outputs_stay_unnamed(tmp_path):
    text = "g (float[1, 2, 8] x) => (float[1, 1, 2] h) { h = ReduceMax (x) }"
    model = build.parsed(text)
    del model.graph.node[:]
    for name, shape in (("W", (1, 16, 8)), ("R", (1, 16, 4))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    model.graph.node.append(onnx.helper.make_node("LSTM", ["x", "W", "R"], ["", "h"], hidden_size=4))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 2, 4]))
    accepted, _ = accept(model, tmp_path)
    assert [o.name for o in accepted.graph[0].outputs] == ["", "h"]


def test_input_shapes(tmp_path):
    cases: list[tuple[Callable[[onnx.TypeProto.Tensor], None], str]] = [
        (lambda t: t.ClearField("shape"), "number of dimensions is unknown"),
        (lambda t: setattr(t.shape.dim[1], "dim_value", 0), "dimension 1 is 0"),
        (lambda t: setattr(t.shape.dim[1], "dim_value", -1), "dimension 1 is -1"),
        (lambda t: setattr(t.shape.dim[1], "dim_value", 2**40), "dimension 1 is"),
        (lambda t: setattr(t, "elem_type", 0), "element type"),
        (lambda t: setattr(t, "elem_type", 999), "element type"),
    ]
    for change, needle in cases:
        model = build.net()
        change(model.graph.input[0].type.tensor_type)
        refuse(model, tmp_path, "input 'x'", needle)


def test_sequence_input(tmp_path):
    model = build.net()
    model.graph.input[0].type.Clear()
    model.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1
    refuse(model, tmp_path, "input 'x'", "sequence")


def test_inputs_with_a_default_are_constants(tmp_path):
    for version, warned in ((3, 0), (8, 1)):
        model = build.net()
        model.ir_version = version
        for name, dims in (("w", [4, 3, 3, 3]), ("b", [4])) if version == 3 else (("w", [4, 3, 3, 3]),):
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
        accepted, warnings = accept(model, tmp_path)
        assert [v.name for v in accepted.graph.inputs] == ["x"]
        assert len(warnings) == warned


def test_output_without_a_shape_gets_the_inferred_one(tmp_path):
    model = build.net()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    accepted, _ = accept(model, tmp_path)
    assert list(accepted.graph.outputs[0].shape)[1:] == [4, 6, 6]


def test_type_error_is_found_by_the_checker(tmp_path):
    model = build.net()
    model.graph.node[0].attribute.add(name="strides", type=onnx.AttributeProto.STRING, s=b"two")
    refuse(model, tmp_path, "ONNX checker")


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "\x1b[31mred\x07", "two\nlines", "x" * 4096, "'; drop", "\u202e"]
)
def test_hostile_names_are_accepted_and_escaped(tmp_path, name):
    model = build.net()
    model.graph.node[1].name = model.graph.node[1].output[0] = model.graph.output[0].name = name
    accepted, _ = accept(model, tmp_path)
    assert accepted.graph[1].name == name
    model.graph.node[1].input[0] = name + "?"
    message = refuse(model, tmp_path, "which nothing defines")
    assert message.count("\n") == 1 and len(message) < 600 + 2 * len(str(tmp_path))
    assert all(c.isprintable() or c == "\n" for c in message)


def test_absurdly_long_name(tmp_path):
    model = build.net()
    model.graph.node[1].name = "x" * 100_000
    refuse(model, tmp_path, "100000 characters", "longer than 65536 bytes")
