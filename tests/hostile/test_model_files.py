"""Files that hold no model, models that would grow without bounds, and versions nobody knows."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import onnx
import pytest

from bitwright.compiler.errors import ModelError, UsageError
from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.model_reader import read_model

from . import build
from .memory import takes_at_most
from .refusals import accept, refusal, refuse

ZOO = os.environ.get("BITWRIGHT_ZOO")


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
    with takes_at_most(50_000):  # of 2.2 GB: it was not read
        refusal(path, "2.0 GiB", "external data")


def test_text_that_is_not_utf8(tmp_path):
    data = build.net().SerializeToString()
    path = tmp_path / "text.onnx"
    path.write_bytes(data.replace(b"conv1", b"c\xff\xfev1"))
    refusal(path, "UTF-8")


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
