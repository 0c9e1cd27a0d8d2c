"""A model written field by field is the model that protobuf would have written."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.graph.wire import SPLICE_ABOVE_BYTES, varint, write_model

TEXT = """
<ir_version: 8, opset_import: ["" : 17], producer_name: "p">
net (float[N, 4] x) => (float[N, 4] y) { y = Identity (x) }
"""
LARGE = SPLICE_ABOVE_BYTES // 4 + 1


@given(st.lists(st.sampled_from([0, 1, 5, LARGE - 1, LARGE, 3 * LARGE]), max_size=5))
@settings(deadline=None, max_examples=50)
def test_weights_of_all_sizes(sizes):
    proto = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for k, size in enumerate(sizes):
        array = rng.integers(-9, 9, size).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(array, f"w{k}"))
    model, stream = ir.from_proto(proto), io.BytesIO()
    write_model(model, stream)
    found = onnx.ModelProto.FromString(stream.getvalue())
    assert found == ir.to_proto(model)


def test_packed_elements():
    values = np.arange(2 * LARGE).astype(np.int8).reshape(2, -1) % 8
    tensor = ir.tensor(values, dtype=ir.DataType.INT8, name="w")
    four = ir.Tensor(values.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name="v")
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    for t in (tensor, four):
        model.graph.register_initializer(
            ir.Value(name=t.name, const_value=t, shape=t.shape, type=ir.TensorType(t.dtype))
        )
    stream = io.BytesIO()
    write_model(model, stream)
    found = onnx.ModelProto.FromString(stream.getvalue())
    assert found == ir.to_proto(model)


def test_external_data_are_copied_into_the_file(tmp_path):
    proto = onnx.parser.parse_model(TEXT)
    weight = np.arange(LARGE, dtype=np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    ir.save(ir.from_proto(proto), tmp_path / "old.onnx", external_data="old.data")
    assert save_model(ir.load(tmp_path / "old.onnx"), tmp_path / "new.onnx") == [tmp_path / "new.onnx"]
    (tmp_path / "old.data").unlink()
    found = onnx.load(tmp_path / "new.onnx").graph.initializer[0]
    np.testing.assert_array_equal(numpy_helper.to_array(found), weight)


@given(st.integers(0, 2**64 - 1))
def test_varint(value):
    assert onnx.TensorProto(data_type=value % 2**31).SerializeToString() == b"\x10" + varint(value % 2**31)
    assert sum((byte & 0x7F) << 7 * k for k, byte in enumerate(varint(value))) == value
