"""Weights are cut out of a model before it is parsed: nothing else may change, whatever the bytes are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.mapped import MappedTensor
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.ingest.detach import CUT_ABOVE_BYTES, detach
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ort.session import open_session, run

from . import build

THRESHOLD = 24
WIDE = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[N, 32, 4, 4] x) => (float[N, 64, 2, 2] y)
{
  [conv1] c = Conv (x, w, b)
  [relu1] y = Relu (c)
}
"""


def wide() -> onnx.ModelProto:
    """A model whose weight is just large enough to be cut out."""
    model = onnx.parser.parse_model(WIDE)
    rng = np.random.default_rng(0)
    for name, shape in {"w": (64, 32, 3, 3), "b": (64,)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    assert len(build.initializer(model, "w").raw_data) > CUT_ABOVE_BYTES
    return model


def restored(data: bytes, threshold: int = THRESHOLD) -> onnx.ModelProto:
    """Cut, parse, and put back what was cut."""
    detached = detach(data, threshold)
    model = onnx.ModelProto.FromString(detached.message)
    for tensor in model.graph.initializer:
        span = detached.span(tensor)
        if span is not None:
            assert span.length > threshold
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            tensor.raw_data = data[span.offset : span.offset + span.length]
    return model


@st.composite
def tensors(draw: st.DrawFn) -> onnx.TensorProto:
    """A tensor as an exporter may write it, and as none would."""
    kind = draw(st.sampled_from([1, 2, 3, 5, 6, 7, 9, 10, 11, 16, 17, 22, 99]))
    tensor = TensorProto(data_type=kind, dims=draw(st.lists(st.integers(0, 300), max_size=4)))
    tensor.name = draw(st.text(max_size=40))
    if draw(st.booleans()):
        tensor.raw_data = draw(st.binary(max_size=200))
    if draw(st.integers(0, 3)) == 0:
        tensor.float_data.extend(draw(st.lists(st.floats(width=32, allow_nan=False), max_size=20)))
    if draw(st.integers(0, 3)) == 0:
        tensor.doc_string = draw(st.text(max_size=40))
    if draw(st.integers(0, 3)) == 0:
        tensor.external_data.add(key="location", value=draw(st.text(max_size=8)))
        tensor.data_location = draw(st.sampled_from([TensorProto.DEFAULT, TensorProto.EXTERNAL]))
    return tensor


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    model = build.net()
    model.graph.initializer.extend(draw(st.lists(tensors(), max_size=5)))
    model.metadata_props.add(key="note", value=draw(st.text(max_size=300)))
    return model


@given(models())
@settings(deadline=None)
def test_nothing_but_the_cut_bytes_changes(model):
    assert restored(model.SerializeToString()) == model


@given(models(), models())
@settings(deadline=None, max_examples=50)
def test_messages_that_protobuf_merges(first, second):
    # Two messages one after the other are one, in which the graph occurs twice.
    data = first.SerializeToString() + second.SerializeToString()
    assert restored(data) == onnx.ModelProto.FromString(data)


damage = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "drop", "add"]), st.integers(0, 255)), min_size=1
)


def damaged(data: bytes, changes: list[tuple[float, str, int]]) -> bytes:
    found = bytearray(data)
    for place, what, byte in changes:
        index = int(place * (len(found) - 1))
        if what == "set":
            found[index] = byte
        elif what == "drop":
            del found[index]
        else:
            found.insert(index, byte)
    return bytes(found)


@given(models(), damage)
@settings(deadline=None, max_examples=300)
def test_damaged_bytes_are_judged_by_the_parser(model, changes):
    data = damaged(model.SerializeToString(), changes)
    try:
        expected = onnx.ModelProto.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            restored(data)
        return
    # Serialized, because a damaged number may be a NaN, which differs from itself.
    assert restored(data).SerializeToString() == expected.SerializeToString()


# The weight's first bytes are behind the nodes: damage before and behind it, not only inside of it.
@given(
    st.one_of(st.floats(0, 0.01), st.floats(0.99, 1)),
    st.sampled_from(["set", "drop", "add"]),
    st.integers(0, 255),
)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused(tmp_path, place, what, byte):
    path = tmp_path / "model.onnx"
    path.unlink(missing_ok=True)  # an earlier example's file may still be mapped
    path.write_bytes(damaged(wide().SerializeToString(), [(place, what, byte)]))
    try:
        read_model(path)
    except ModelError as error:
        assert error.fix


@pytest.mark.parametrize("part", [0.001, 0.01, 0.5, 0.99, 0.99999])
def test_a_file_that_is_cut_off(tmp_path, part):
    data = wide().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(ModelError):
        read_model(path)


def test_the_wrong_amount_of_data_is_refused_like_any_other(tmp_path):
    model = wide()
    build.initializer(model, "w").raw_data += b"\0\0\0\0"
    with pytest.raises(ModelError, match=r"need 73728 bytes of data, the file holds 73732"):
        read_model(build.write(model, tmp_path))


def test_a_file_of_tiny_fields_is_left_to_the_parser():
    # Three million empty nodes: 6 MB that would take Python seconds to walk.
    graph = b"\x0a\x00" * 3_000_000
    length = onnx.ModelProto(producer_name="x" * len(graph)).SerializeToString()[1 : -len(graph)]
    data = b"\x3a" + length + graph
    assert detach(data).message == data


def test_no_file_can_name_itself_as_the_source(tmp_path):
    model = wide()
    data = build.make_external(model, location="0" * 32, offset="0", length="73728")
    assert len(data) == 73728
    with pytest.raises(ModelError, match="cannot be found"):
        read_model(build.write(model, tmp_path))


@pytest.mark.parametrize("linked", ["symbolic", "hard"])
def test_weights_of_a_linked_model_file(tmp_path, linked):
    # Model caches link their files; the rules on links are for the paths that a model names, not for the user's.
    target = build.write(wide(), tmp_path)
    path = tmp_path / "linked.onnx"
    if linked == "symbolic":
        path.symlink_to(target)
    else:
        os.link(target, path)
    tensor = read_model(path).model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    np.testing.assert_array_equal(tensor.numpy(), numpy_helper.to_array(build.initializer(wide(), "w")))


def test_mapped_weights_are_what_onnx_reads(tmp_path):
    path = build.write(wide(), tmp_path)
    model = read_model(path).model
    for tensor in onnx.load(path).graph.initializer:
        found = model.graph.initializers[tensor.name].const_value
        np.testing.assert_array_equal(found.numpy(), numpy_helper.to_array(tensor))
        assert found.tobytes() == tensor.raw_data
        assert not found.numpy().flags.writeable


def test_a_model_can_be_saved_over_its_own_file(tmp_path):
    path = build.write(wide(), tmp_path)
    model = read_model(path).model
    for external in (False, True, False):
        save_model(model, path, external=external)
        expected = numpy_helper.to_array(build.initializer(wide(), "w"))
        np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), expected)
        np.testing.assert_array_equal(
            read_model(path).model.graph.initializers["w"].const_value.numpy(), expected
        )


def test_sessions_of_models_with_external_data(tmp_path):
    inline = wide()
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 32, 4, 4)).astype(np.float32)}
    expected = run(open_session(read_model(build.write(inline, tmp_path, "inline.onnx")).model), feeds)
    external = wide()
    data = build.make_external(external, location="w.bin")
    (tmp_path / "w.bin").write_bytes(data)
    model = read_model(build.write(external, tmp_path)).model
    (tmp_path / "w.bin").unlink()  # nothing reads it by its name again
    np.testing.assert_array_equal(run(open_session(model), feeds)["y"], expected["y"])


def test_reading_takes_no_memory_for_weights(tmp_path):
    """96 MB of weights; a parser that copies would need as much, twice."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[N, 4096] x) => (float[N, 6144] y) { y = MatMul (x, w) }'
    )
    weight = np.ones((4096, 6144), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    path = build.write(model, tmp_path)
    program = (
        "import sys; from pathlib import Path\n"
        "from bitwright.compiler.ingest.model_reader import read_model\n"
        "def kib(key): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith(key))\n"
        "before = kib('VmRSS'); source = read_model(Path(sys.argv[1])); print(kib('VmHWM') - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    # The checks read in pieces of 1 MiB; the rest is onnx's operator schemas and the first use of libraries.
    assert int(done.stdout) < 40 << 10
