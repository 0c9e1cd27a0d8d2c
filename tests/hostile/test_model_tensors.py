"""Malformed tensors of a model."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from . import build
from .refusals import accept, refuse


@pytest.mark.parametrize("dims", [(5, 3, 3, 3), (4, 3, 3), (0, 3, 3, 3)])
def test_dims_disagree_with_data(tmp_path, dims):
    model = build.net()
    tensor = build.initializer(model, "w")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    refuse(model, tmp_path, "tensor 'w'", "432", str(4 * math.prod(dims)))


def test_absurd_dims(tmp_path):
    for dims, needle in (
        ((-4, 3, 3, 3), "-4"),
        ((2**31, 2**31), str(2**31)),
        ((2**31 - 1, 2**31 - 1), "TiB"),
    ):
        model = build.net()
        tensor = build.initializer(model, "w")
        del tensor.dims[:]
        tensor.dims.extend(dims)
        refuse(model, tmp_path, "tensor 'w'", needle)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(tmp_path, value):
    model = build.net()
    build.set_weights(model, "w", {40: value, 77: value})
    refuse(model, tmp_path, "tensor 'w'", "[1, 1, 1, 1]", str(value))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_nan_in_every_float_type(tmp_path, kind):
    text = "g (float[4] x) => (float[4] y) { c = Cast <to = 1> (w) [add] y = Add (x, c) }"
    model = build.parsed(text)
    model.graph.initializer.append(onnx.helper.make_tensor("w", kind, [4], [1.0, 2.0, math.nan, 3.0]))
    refuse(model, tmp_path, "tensor 'w'", "[2]", "nan")


def test_minus_infinity_as_a_mask_is_accepted(tmp_path):
    text = """g (float[2, 2] x) => (float[2, 2] y)
    { u = Unsqueeze (mask, axis) s = Squeeze (u, axis) m = Add (x, s) y = Softmax (m) }"""
    model = build.parsed(text)
    mask = np.array([[0, -np.inf], [0, 0]], np.float32)
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
    _, warnings = accept(model, tmp_path)
    assert len(warnings) == 1 and "tensor 'mask'" in warnings[0] and "-inf" in warnings[0]
    build.set_weights(model, "mask", {1: math.inf})
    refuse(model, tmp_path, "tensor 'mask'", "inf")


def test_zero_and_denormal_channels_are_accepted(tmp_path):
    model = build.net()
    build.set_weights(model, "w", dict.fromkeys(range(27), 0.0) | dict.fromkeys(range(27, 54), 1e-42))
    _, warnings = accept(model, tmp_path)
    assert warnings == ()


def test_absurd_bias_is_a_warning(tmp_path):
    model = build.net()
    build.set_weights(model, "b", {2: 1e9})
    _, warnings = accept(model, tmp_path)
    assert len(warnings) == 1
    assert "node 'conv1'" in warnings[0] and "1e+09" in warnings[0]


def test_strings_and_sparse_tensors(tmp_path):
    text = "g (float[2] x) => (float[2] y) { y = Relu (x) }"
    model = build.parsed(text)
    model.graph.initializer.append(onnx.helper.make_tensor("words", TensorProto.STRING, [1], [b"a"]))
    refuse(model, tmp_path, "tensor 'words'", "strings")
    model = build.parsed(text)
    values = numpy_helper.from_array(np.ones(1, np.float32), "thin")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [9]))
    refuse(model, tmp_path, "tensor 'thin'", "sparse")
    model = build.parsed("g (string[2] x) => (string[2] y) { y = Identity (x) }")
    refuse(model, tmp_path, "input 'x'", "strings")
