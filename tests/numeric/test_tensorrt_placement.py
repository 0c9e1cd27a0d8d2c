"""Deployment for TensorRT and the CUDA provider: where quantizers stand, what the audit finds, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.parser import parse_model

from bitwright.compiler.deploy import Deployment, quantize
from bitwright.compiler.errors import ProfileError, ToolchainError, UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.ort.audit import Audit
from bitwright.compiler.ort.placement import audit_placement
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.targets.loader import load_profile

RESIDUAL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[1,16,8,8] x) => (float[1,10] y) {
  a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0, b0)
  ar = Relu(a)
  b = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(ar, w1, b1)
  s = Add(b, ar)
  sr = Relu(s)
  c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(sr, w1, b1)
  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)
  d = Conv<kernel_shape=[3,3]>(m, w0, b0)
  p = GlobalAveragePool(d)
  f = Flatten(p)
  l = Gemm(f, wf, bf)
  y = Softmax(l)
}"""
SHAPES = {
    "w0": (16, 16, 3, 3),
    "b0": (16,),
    "w1": (16, 16, 3, 3),
    "b1": (16,),
    "wf": (16, 10),
    "bf": (10,),
}
CUDA = "schema: 1\nname: cuda\nextends: [nvidia-a100, onnxruntime_cuda]\ndescription: the CUDA provider\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    proto = parse_model(RESIDUAL)
    for name, shape in SHAPES.items():
        array = (random.standard_normal(shape) * 0.1).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("residual") / "residual.onnx"
    onnx.save(proto, path)
    return path


def samples() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((1, 16, 8, 8)).astype(np.float32)} for _ in range(8)]


def deploy(model: Path, target: str, output: Path, recipe: str = "int8") -> Deployment:
    return quantize(Options(model=model, target=target, data=samples(), output=output, recipe=recipe))


def readers(graph: ir.Graph, op_type: str) -> list[list[str]]:
    """Return for each node of a type the operators that write its inputs ("-": a constant)."""
    return [
        ["-" if v is None or v.producer() is None else v.producer().op_type for v in node.inputs]  # type: ignore[union-attr]
        for node in graph
        if node.op_type == op_type
    ]


@pytest.fixture(scope="module")
def int8(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return deploy(model, "nvidia-orin", tmp_path_factory.mktemp("int8") / "q.onnx")


def test_quantizers_stand_where_tensorrt_fuses_them(int8: Deployment) -> None:
    graph = ir.load(int8.model).graph
    dq = "DequantizeLinear"
    # Both operands of every convolution; biases stay float.
    assert readers(graph, "Conv") == [[dq, dq, "-"]] * 4
    # Of the residual Add only the branch that does not come from the convolution.
    assert readers(graph, "Add") == [["Conv", dq]]
    # A product with one row fills no tensor core; islands and what lets quantizers pass stand in float.
    assert readers(graph, "Gemm") == [["Flatten", "-", "-"]]
    assert readers(graph, "Softmax") == [["Gemm"]]
    assert readers(graph, "MaxPool") == [["Conv"]]
    assert readers(graph, "Relu") == [["Conv"], ["Add"]]
    zeros = [n.inputs[2].const_value.numpy() for n in graph if n.op_type == "QuantizeLinear"]  # type: ignore[union-attr]
    assert all(z.dtype == np.int8 and not z.any() for z in zeros)


def test_the_report_names_the_patterns_and_no_time(int8: Deployment) -> None:
    report = json.loads(int8.report_file.read_text())
    patterns = {p["node"]: p["pattern"] for p in report["audit"]["patterns"]}
    operands = "[INT8 activation, INT8 weight]"
    assert list(patterns.values()) == [
        f"{operands} -> Conv -> Relu -> Q",
        f"{operands} -> Conv -> Add(DQ) -> Relu -> Q",
        f"{operands} -> Conv",
        f"{operands} -> Conv",
    ]
    assert all(f["harmless"] for f in report["audit"]["findings"])
    assert report["timing"]["onnxruntime"] is None and report["gate"] is None
    notes = [note for phase in report["phases"] for note in phase["notes"]]
    assert any("not timed: TensorrtExecutionProvider" in note for note in notes)


def test_the_session_file_names_tensorrt_alone(int8: Deployment) -> None:
    session = json.loads(int8.session.read_text())
    assert session["providers"] == ["TensorrtExecutionProvider"]
    (options,) = session["provider_options"]
    assert options["trt_int8_enable"] == options["trt_fp16_enable"] == "True"
    assert "trt_int8_calibration_table_name" not in options
    assert session["graph_optimization_level"] == "ORT_DISABLE_ALL"


def test_the_model_computes_what_the_float_model_does(int8: Deployment, model: Path) -> None:
    plain = SessionConfig(optimize=False)
    exact, found = open_session(model, plain), open_session(int8.model, plain)
    for feeds in samples():
        expected = run(exact, feeds)["y"]
        # Probabilities near 0.1; eight bits lose some 1e-4 of them here.
        assert np.abs(run(found, feeds)["y"] - expected).max() < 2e-3


def test_a_provider_that_is_not_there_is_an_error_and_no_fallback(int8: Deployment) -> None:
    with pytest.raises(ToolchainError, match="cannot use TensorrtExecutionProvider on this machine"):
        open_session(int8.model, SessionConfig(provider="TensorrtExecutionProvider"))


def test_fp8_on_hopper(model: Path, tmp_path: Path) -> None:
    found = deploy(model, "nvidia-h100", tmp_path / "q.onnx", "fp8")
    loaded = ir.load(found.model)
    assert loaded.opset_imports[""] == 21
    kinds = {n.outputs[0].dtype for n in loaded.graph if n.op_type == "QuantizeLinear"}
    assert kinds == {ir.DataType.FLOAT8E4M3FN}
    assert readers(loaded.graph, "Add") == [["Conv", "DequantizeLinear"]]
    patterns = json.loads(found.report_file.read_text())["audit"]["patterns"]
    assert len(patterns) == 4 and all(p["kernel"].startswith("fp8 Conv") for p in patterns)


def test_fp8_is_no_format_of_ampere(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no kernel for the format fp8 on nvidia-a100"):
        deploy(model, "nvidia-a100", tmp_path / "q.onnx", "fp8")


def test_four_bit_blocks(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    proto = parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[1,8,256] x) => (float[1,8,64] y) { y = MatMul(x, w) }"""
    )
    weight = random.standard_normal((256, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "m.onnx")
    data = [{"x": random.standard_normal((1, 8, 256)).astype(np.float32)} for _ in range(4)]
    output = tmp_path / "q.onnx"
    quantize(Options(model=tmp_path / "m.onnx", target="nvidia-orin", data=data, output=output, recipe="w4"))
    loaded = ir.load(output)
    (node,) = [n for n in loaded.graph if n.op_type == "DequantizeLinear"]
    assert (node.attributes["axis"].as_int(), node.attributes["block_size"].as_int()) == (0, 128)
    assert node.inputs[0].dtype == ir.DataType.INT4 and len(node.inputs) == 2  # type: ignore[union-attr]
    audit = audit_placement(loaded, load_profile("nvidia-orin").runtimes.onnxruntime)
    assert audit is not None and not audit.findings
    assert audit.patterns[0].kernel.startswith("weight-only product")


def test_the_cuda_provider_refuses_int8_with_the_reason(model: Path, tmp_path: Path) -> None:
    profile = tmp_path / "cuda.yaml"
    profile.write_text(CUDA)
    with pytest.raises(UsageError, match=r"no kernels for QLinearConv.*longer than fp16") as refusal:
        deploy(model, str(profile), tmp_path / "q.onnx")
    assert "TensorrtExecutionProvider" in str(refusal.value) and "fp16" in (refusal.value.fix or "")
    found = deploy(model, str(profile), tmp_path / "h.onnx", "fp16")
    assert json.loads(found.session.read_text())["providers"] == ["CUDAExecutionProvider"]
    assert any(v.dtype == ir.DataType.FLOAT16 for v in ir.load(found.model).graph.initializers.values())


def test_a_profile_cannot_claim_int8_for_the_cuda_provider(tmp_path: Path) -> None:
    profile = tmp_path / "cuda.yaml"
    combo = "{format: w4a8, act: a8, weight: w4, out: [a8]}"
    claim = f"runtimes: {{onnxruntime: {{ops: {{Conv: {{role: anchor, combos: [{combo}]}}}}}}}}\n"
    profile.write_text(CUDA + claim)
    with pytest.raises(ProfileError, match="conversions around float products"):
        load_profile(str(profile))


QDQ = """<ir_version: 10, opset_import: ["" : 21]>
g (float[4,32] x) => (float[4,8] y)
<float one = {1.0}, float[8] many = {1,1,1,1,1,1,1,1}, int8 zero = {0}, int8 three = {3}, uint8 middle = {128}>
{
  %s
}"""
WEIGHT = np.random.default_rng(0).integers(-127, 128, (32, 8)).astype(np.int8)
# What is wrong -> (the graph's nodes, what the audit says).
BROKEN = {
    "unsigned": (
        "q = QuantizeLinear(x, one, middle) d = DequantizeLinear(q, one, middle) "
        "v = DequantizeLinear(w, one, zero) y = MatMul(d, v)",
        "UINT8 is no type of TensorRT's quantizers",
    ),
    "zero point": (
        "q = QuantizeLinear(x, one, three) d = DequantizeLinear(q, one, three) "
        "v = DequantizeLinear(w, one, zero) y = MatMul(d, v)",
        "its zero point is not 0",
    ),
    "one operand": ("v = DequantizeLinear(w, one, zero) y = MatMul(x, v)", "only one operand has Q/DQ"),
    "bias": (
        "q = QuantizeLinear(x, one, zero) d = DequantizeLinear(q, one, zero) "
        "v = DequantizeLinear(w, one, zero) c = DequantizeLinear(b, one) y = Gemm(d, v, c)",
        "TensorRT takes a float bias",
    ),
    "island": (
        "q = QuantizeLinear(x, one, zero) d = DequantizeLinear(q, one, zero) s = Softmax(d) "
        "v = Identity(f) y = MatMul(s, v)",
        "Softmax has no integer kernel",
    ),
    "axis": (
        "q = QuantizeLinear(x, one, zero) d = DequantizeLinear(q, one, zero) "
        "v = DequantizeLinear<axis=0>(w, rows) y = MatMul(d, v)",
        "scales along axis 0 of its weight; they belong to axis 1",
    ),
    "blocks of bytes": (
        "q = QuantizeLinear(x, one, zero) d = DequantizeLinear(q, one, zero) "
        "v = DequantizeLinear<axis=0, block_size=16>(w, blocks) y = MatMul(d, v)",
        "blocks of 16 INT8 values",
    ),
    "twice": (
        "q = QuantizeLinear(x, one, zero) d = DequantizeLinear(q, one, zero) r = QuantizeLinear(d, one, zero) "
        "e = DequantizeLinear(r, one, zero) v = DequantizeLinear(w, one, zero) y = MatMul(e, v)",
        "quantizes what was dequantized",
    ),
    "smallest": (
        "q = QuantizeLinear(x, one, zero) d = DequantizeLinear(q, one, zero) "
        "v = DequantizeLinear(n, one, zero) y = MatMul(d, v)",
        "its weight holds -128",
    ),
}


def audited(nodes: str) -> Audit:
    proto = parse_model(QDQ % nodes)
    extra = {
        "w": WEIGHT,
        "n": np.full((32, 8), -128, np.int8),
        "b": np.zeros(8, np.int32),
        "f": np.ones((32, 8), np.float32),
        "rows": np.ones(32, np.float32),
        "blocks": np.ones((2, 8), np.float32),
    }
    for name, array in extra.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    found = audit_placement(model, load_profile("nvidia-orin").runtimes.onnxruntime)
    assert found is not None
    return found


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_rule_is_found(name: str) -> None:
    nodes, said = BROKEN[name]
    whys = [f.why for f in audited(nodes).unexpected]
    assert any(said in why for why in whys), whys


def test_a_model_that_keeps_the_rules_has_no_findings() -> None:
    nodes = (
        "q = QuantizeLinear(x, one, zero) d = DequantizeLinear(q, one, zero) "
        "v = DequantizeLinear<axis=1>(w, many) y = MatMul(d, v)"
    )
    assert not audited(nodes).findings


def test_other_providers_have_no_placement_rules() -> None:
    model = ir.from_proto(parse_model(RESIDUAL))
    assert audit_placement(model, load_profile("x86-avx2").runtimes.onnxruntime) is None


def test_the_session_file_is_read_back(int8: Deployment) -> None:
    from bitwright.compiler.bench.models import load_session_config

    config = load_session_config(int8.session)
    assert config.provider == "TensorrtExecutionProvider" and not config.optimize
    assert dict(config.provider_options or {})["trt_int8_enable"] == "True"
