"""Every malformed model is refused at once, by a message that names file, place, rule and fix."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from bitwright.compiler.errors import ModelError, UsageError
from bitwright.compiler.graph.mapped import MappedTensor
from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.model_reader import read_model

from . import build

ZOO = os.environ.get("BITWRIGHT_ZOO")


def refusal(path: Path, *needles: str, limits: Limits | None = None) -> str:
    """Read a bad model, check the form of the refusal, and return its text."""
    started = time.process_time()
    with pytest.raises(ModelError) as caught:
        read_model(path, limits or Limits())
    # Processor time, so that a loaded machine does not matter: no work may grow with what the file claims.
    assert time.process_time() - started < 1.0
    error = caught.value
    assert error.exit_code == 3
    assert error.where.startswith(str(path))
    assert error.fix
    for needle in needles:
        assert needle in error.message, error.message
    return error.message


def refuse(model: onnx.ModelProto, folder: Path, *needles: str, limits: Limits | None = None) -> str:
    return refusal(build.write(model, folder), *needles, limits=limits)


def accept(model: onnx.ModelProto, folder: Path) -> tuple[ir.Model, tuple[str, ...]]:
    source = read_model(build.write(model, folder))
    onnx.checker.check_model(ir.to_proto(source.model), full_check=True)
    return source.model, source.warnings


# --- the file
# ---------------------------------------------------------------------------------------------------


def test_a_good_model_is_read_with_its_provenance(tmp_path):
    path = build.write(build.net(), tmp_path)
    source = read_model(path)
    assert source.warnings == ()
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.bytes == path.stat().st_size
    assert [n.name for n in source.model.graph] == ["conv1", "relu1"]


def test_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="No such file") as caught:
        read_model(tmp_path / "none.onnx")
    assert caught.value.exit_code == 2


def test_folder_and_pipe(tmp_path):
    refusal(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe.onnx")
    refusal(tmp_path / "pipe.onnx", "not a regular file")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"GIF89a" * 50, b"\xff" * 4096])
def test_garbage(tmp_path, content):
    path = tmp_path / "garbage.onnx"
    path.write_bytes(content)
    refusal(path)


def test_truncated(tmp_path):
    data = build.net().SerializeToString()
    path = tmp_path / "cut.onnx"
    for kept in range(1, len(data) - 1, 37):
        path.write_bytes(data[:kept])
        refusal(path)


def test_too_large_file_is_not_read(tmp_path):
    path = tmp_path / "huge.onnx"
    with path.open("wb") as stream:
        stream.truncate(2_200_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(path, "2.0 GiB", "external data")
    # Kilobytes on Linux: the file is 2.2 GB, so 50 MB says that it was not read.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_text_that_is_not_utf8(tmp_path):
    data = build.net().SerializeToString()
    path = tmp_path / "text.onnx"
    path.write_bytes(data.replace(b"conv1", b"c\xff\xfev1"))
    refusal(path, "UTF-8")


# --- nesting and size
# -------------------------------------------------------------------------------------------


def test_nested_bodies(tmp_path):
    accept(build.nested_if(18), tmp_path)
    refuse(build.nested_if(22), tmp_path, "nested deeper than 20")
    refuse(build.nested_if(60), tmp_path, "nested")


def test_many_bodies_and_nodes(tmp_path):
    model = build.nested_if(1)
    for _ in range(600):
        model.graph.node.append(model.graph.node[0])
    refuse(model, tmp_path, "more than 1000 control-flow bodies")
    chain = build.net()
    chain.graph.node.extend([chain.graph.node[1]] * 50)
    refuse(chain, tmp_path, "more than 20 nodes", limits=Limits(nodes=20))


def test_functions_that_double_at_every_call(tmp_path):
    functions = ['<domain: "f", opset_import: ["" : 17]> f0 (a) => (b) { b = Relu (a) }']
    functions += [
        f'<domain: "f", opset_import: ["" : 17, "f" : 1]> f{k} (a) => (c)'
        f"{{ b = f.f{k - 1} (a) c = f.f{k - 1} (b) }}"
        for k in range(1, 31)
    ]
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "f" : 1]> g (float[2] x) => (float[2] y) { y = f.f30 (x) }\n'
    )
    refuse(onnx.parser.parse_model(text + "\n".join(functions)), tmp_path, "once its functions are inlined")


def test_function_that_calls_itself(tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
    g (float[2] x) => (float[2] y) { y = f.f0 (x) }
    <domain: "f", opset_import: ["" : 17, "f" : 1]> f0 (a) => (b) { b = f.f0 (a) }"""
    refuse(onnx.parser.parse_model(text), tmp_path, "function 'f0'", "calls itself")


def test_constant_of_shape_bomb(tmp_path):
    text = """g (float[1] x) => (float[N] z)
    { s = Constant <value = int64[1] {1099511627776}> () [bomb] y = ConstantOfShape (s) z = Add (x, y) }"""
    refuse(build.parsed(text), tmp_path, "node 'bomb'", "4.0 TiB")


def test_expand_bomb(tmp_path):
    text = (
        """g (float[1] x) => (float[A, B] y) <int64[2] s = {1048576, 1048576}> { [bomb] y = Expand (x, s) }"""
    )
    refuse(build.parsed(text), tmp_path, "node 'bomb'", "4.0 TiB")


# --- versions and operators
# -------------------------------------------------------------------------------------


def test_opset_import(tmp_path):
    model = build.net()
    model.opset_import[0].version = 9999
    refuse(model, tmp_path, "opset 9999", "7..26")
    model.opset_import[0].version = 6
    refuse(model, tmp_path, "opset 6")
    del model.opset_import[:]
    refuse(model, tmp_path, "opset_import")
    for version in (13, 17):
        model.opset_import.add(domain="ai.onnx" if version == 13 else "", version=version)
    refuse(model, tmp_path, "two versions")


def test_standard_domain_by_its_long_name(tmp_path):
    model = build.net()
    model.opset_import[0].domain = model.graph.node[0].domain = "ai.onnx"
    accepted, _ = accept(model, tmp_path)
    assert accepted.opset_imports[""] == 17
    assert {n.domain for n in accepted.graph} == {""}


@pytest.mark.parametrize("domain", ["com.acme", "ai.onnx.ml", "ai.onnx.training"])
def test_unknown_domain(tmp_path, domain):
    model = build.net()
    model.opset_import.add(domain=domain, version=1)
    accept(model, tmp_path)
    model.graph.node[1].domain = domain
    refuse(model, tmp_path, "node 'relu1'", f"{domain}::Relu", "custom operators")


def test_domain_that_is_not_imported(tmp_path):
    model = build.net()
    model.graph.node[1].domain = "com.microsoft"
    model.graph.node[1].op_type = "FastGelu"
    refuse(model, tmp_path, "node 'relu1'", "not imported")
    model.opset_import.add(domain="com.microsoft", version=1)
    accept(model, tmp_path)


def test_unknown_and_withdrawn_operator(tmp_path):
    model = build.net()
    model.graph.node[1].op_type = "Rleu"
    refuse(model, tmp_path, "node 'relu1'", "'Rleu'", "opset 17")
    model.graph.node[1].op_type = "Upsample"
    refuse(model, tmp_path, "node 'relu1'", "withdrawn")


def test_ir_version(tmp_path):
    model = build.net()
    model.ir_version = 99
    refuse(model, tmp_path, "IR version 99")


# --- connections
# ------------------------------------------------------------------------------------------------


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


# --- tensors
# ----------------------------------------------------------------------------------------------------


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


# --- inputs
# -----------------------------------------------------------------------------------------------------


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


# --- names
# ------------------------------------------------------------------------------------------------------


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


# --- external data
# ----------------------------------------------------------------------------------------------


def external(folder: Path, location: str = "w.bin", data: bytes | None = None, **entries: str) -> Path:
    model = build.net()
    content = build.make_external(model, location=location, **entries)
    (folder / "w.bin").write_bytes(content if data is None else data)
    return build.write(model, folder)


def test_external_data_stays_on_disk(tmp_path):
    path = external(tmp_path)
    source = read_model(path)
    tensor = source.model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    assert tensor.tobytes() == build.initializer(build.net(), "w").raw_data
    assert source.external_files == ((tmp_path / "w.bin").resolve(),)
    both = path.read_bytes() + (tmp_path / "w.bin").read_bytes()
    assert (source.bytes, source.sha256) == (len(both), hashlib.sha256(both).hexdigest())


def test_external_data_in_a_subfolder(tmp_path):
    (tmp_path / "sub").mkdir()
    path = external(tmp_path, "sub/w.bin")
    (tmp_path / "w.bin").rename(tmp_path / "sub" / "w.bin")
    assert len(read_model(path).external_files) == 1


@pytest.mark.parametrize(
    "location", ["../w.bin", "sub/../../w.bin", "/etc/passwd", "..\\w.bin", "C:\\w.bin", "a\0b"]
)
def test_external_path_that_leaves_the_folder(tmp_path, location):
    refusal(external(tmp_path, location), "tensor 'w'", "external data location")


def test_external_missing_short_and_special(tmp_path):
    refusal(external(tmp_path, "none.bin"), "tensor 'w'", "'none.bin'", "cannot be found")
    refusal(external(tmp_path, data=b"\0" * 100), "tensor 'w'", "100 bytes", "432")
    refusal(external(tmp_path, "."), "tensor 'w'", "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    refusal(external(tmp_path, "pipe"), "tensor 'w'", "not a regular file")


def test_external_links(tmp_path):
    inside, outside = tmp_path / "model", tmp_path / "secret.bin"
    inside.mkdir()
    outside.write_bytes(b"\0" * 432)
    path = external(inside, "link.bin")
    (inside / "link.bin").symlink_to(outside)
    refusal(path, "tensor 'w'", "symbolic link")
    (inside / "link.bin").unlink()
    (inside / "link.bin").symlink_to(inside / "w.bin")
    refusal(path, "tensor 'w'", "symbolic link")
    (inside / "link.bin").unlink()
    (inside / "link.bin").hardlink_to(outside)
    refusal(path, "tensor 'w'", "2 hard links")
    (inside / "folder").symlink_to(tmp_path)
    refusal(external(inside, "folder/secret.bin"), "tensor 'w'", "symbolic link")


@pytest.mark.parametrize(
    ("entries", "needle"),
    [
        ({"offset": "-8"}, "offset"),
        ({"offset": "0x10"}, "offset"),
        ({"offset": str(2**62)}, "432 bytes"),
        ({"length": str(2**62)}, "length"),
        ({"length": "431"}, "432 bytes"),
        ({"length": "\u0664\u0663\u0662"}, "length"),
        ({"offset": "4", "length": "432"}, "432 bytes"),
        ({"__class__": "x"}, "unknown key '__class__'"),
        ({"checksum": "0" * 40}, "SHA-1"),
    ],
)
def test_external_entries(tmp_path, entries, needle):
    refusal(external(tmp_path, **entries), "'w", needle)


def test_external_checksum_that_fits(tmp_path):
    data = build.initializer(build.net(), "w").raw_data
    read_model(external(tmp_path, checksum=hashlib.sha1(data, usedforsecurity=False).hexdigest()))


def test_external_nan(tmp_path):
    weights = np.ones((4, 3, 3, 3), np.float32)
    weights[3, 2, 1, 0] = np.nan
    refusal(external(tmp_path, data=weights.tobytes()), "tensor 'w'", "[3, 2, 1, 0]")


def test_sparse_and_stored_parts_of_a_data_file_are_both_seen(tmp_path):
    """Holes are not read; a NaN behind gigabytes of them, at an odd place, is found all the same."""
    model = build.parsed("g (float[N, 1000] x) => (float[N, 9000] y) { [big] y = MatMul (x, w) }")
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1000, 9000])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    tensor.external_data.add(key="offset", value="3")
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(3 + 4 * 9_000_000)
        stream.seek(3 + 4 * (700 * 9000 + 5))
        stream.write(np.float32(np.nan).tobytes())
    path = build.write(model, tmp_path)
    refusal(path, "tensor 'w'", "[700, 5]")
    with (tmp_path / "w.bin").open("r+b") as stream:
        stream.seek(3 + 4 * (700 * 9000 + 5))
        stream.write(np.float32(1).tobytes())
    both = path.read_bytes() + (tmp_path / "w.bin").read_bytes()
    assert read_model(path).sha256 == hashlib.sha256(both).hexdigest()


def test_model_above_two_gigabytes(tmp_path):
    rows = 540_000
    model = build.parsed(f"g (float[N, 1000] x) => (float[N, {rows}] y) {{ [big] y = MatMul (x, w) }}")
    tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1000, rows])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(4 * 1000 * rows)
    path = build.write(model, tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = read_model(path)
    # The file is hashed and checked in pieces of 1 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    assert source.bytes > 2**31
    assert source.model.graph.initializers["w"].const_value.nbytes == 4 * 1000 * rows


# --- real models
# ------------------------------------------------------------------------------------------------


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO, reason="BITWRIGHT_ZOO is not set: no folder of real models")
def test_zoo_is_read_or_refused_with_a_reason():
    refused = {}
    for path in sorted(Path(ZOO or "").glob("*/*.onnx")):
        try:
            source = read_model(path)
        except ModelError as error:
            refused[path.name] = error.message
            continue
        names = [node.name for node in source.model.graph]
        assert all(names) and len(set(names)) == len(names), path
    assert set(refused) == {"skeleton.onnx", "unknown_custom_op.onnx"}
    assert "word.weight" in refused["skeleton.onnx"]
    assert "FancyGate" in refused["unknown_custom_op.onnx"]
