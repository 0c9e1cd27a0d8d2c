"""From ONNX to an Ethos-U: the whole way with Vela, its gates, what it says, and the choice of formats."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.cli.app import main
from bitwright.compiler.errors import (
    InfeasibleBudgetError,
    PerformanceGateError,
    ToolchainError,
    UsageError,
)
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.sweep import sweep_model
from bitwright.targets.ethos_u.execution import accepted
from bitwright.targets.ethos_u.generator import compile_file
from bitwright.targets.ethos_u.translate import translate
from bitwright.targets.loader import load_profile

for package in ("ethosu.vela", "ai_edge_litert", "flatbuffers"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'bitwright[ethos-u]'")

TARGET = "ethos-u55-128"
CNN = """
<ir_version: 8, opset_import: ["" : 17]>
cnn (float[1,4,16,16] x) => (float[1,10] y)
{
  c1 = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1], group=16>(r1, w2, b2)
  r2 = Relu(c2)
  s = Add(r2, r1)
  m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)
  f = Flatten(m)
  g = Gemm(f, w3, b3)
  y = Softmax(g)
}
"""
GATED = """
<ir_version: 8, opset_import: ["" : 17]>
gated (float[1,8,6,6] x) => (float[1,8,6,6] z)
{
  a = Conv(x, w, b)
  g = Sigmoid(a)
  m = Mul(a, g)
  t = Tanh(m)
  c = Concat<axis=1>(t, g)
  y = Conv(c, v, b)
  l = LeakyRelu<alpha=0.1>(y)
  z = Transpose<perm=[0,1,3,2]>(l)
}
"""
MLP = """
<ir_version: 8, opset_import: ["" : 17]>
mlp (float[1,256] x) => (float[1,128] y)
{
  a = Gemm(x, w1, b1)
  r = Relu(a)
  b = Gemm(r, w2, b2)
  s = Relu(b)
  y = Gemm(s, w3, b3)
}
"""
WEIGHTS = {
    CNN: {"w1": (16, 4, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (256, 10), "b3": (10,)},
    GATED: {"w": (8, 8, 1, 1), "b": (8,), "v": (8, 16, 1, 1)},
    MLP: {"w1": (256, 128), "b1": (128,), "w2": (128, 128), "b2": (128,), "w3": (128, 128), "b3": (128,)},
}


def write(text: str, path: Path, extra: str = "") -> Path:
    rng = np.random.default_rng(7)
    proto = onnx.parser.parse_model(text.replace("// more", extra))
    for name, shape in WEIGHTS[text].items():
        fan = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
        weight = (rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    onnx.save(proto, path)
    return path


def samples(shape: tuple[int, ...], count: int = 12) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def build(text: str, folder: Path, target: str | Path = TARGET, **more: object) -> Bundle:
    shape = {CNN: (1, 4, 16, 16), GATED: (1, 8, 6, 6), MLP: (1, 256)}[text]
    model = write(text, folder / "model.onnx")
    options = Options(model=model, target=str(target), data=samples(shape), output=folder / "out", **more)  # type: ignore[arg-type]
    bundle = compile_model(options)
    assert bundle is not None
    return bundle


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(CNN, tmp_path_factory.mktemp("cnn"))


def test_everything_runs_on_the_accelerator_and_every_layer_is_equal(cnn: Bundle) -> None:
    found = verify(cnn.path)
    assert found.passed and found.calls == 2 * 6  # two golden sets of conv, conv, add, pool, gemm, softmax
    assert found.executed == "TFLite reference kernels"
    figures = {m["label"]: m["value"] for m in cnn.report["generated"]["measurements"]}
    assert figures["Operators on the accelerator"] == "100%"
    assert cnn.report["generated"]["not_generated"] == {}


def test_outputs_are_those_of_the_quantized_model_but_for_roundings(cnn: Bundle) -> None:
    for feeds in samples((1, 4, 16, 16), 4):
        ours, theirs = cnn.run(feeds)["y"], cnn.run(feeds, "ort")["y"]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert np.abs(ours - theirs).max() <= 8 / 256  # a Softmax amplifies a step of its input


def test_images_lie_channels_last_without_a_transposition(cnn: Bundle) -> None:
    from bitwright.compiler.ingest.model_reader import read_model

    graph = accepted(translate(read_model(cnn.path / "lib/model.static.onnx").model))
    operators = [layer.operator for layer in graph.layers]
    assert operators == [
        *(
            "PAD",
            "CONV_2D",
            "DEPTHWISE_CONV_2D",
            "ADD",
            "MAX_POOL_2D",
            "RESHAPE",
            "FULLY_CONNECTED",
            "SOFTMAX",
        ),
    ]
    assert graph.inputs["x"].shape == (1, 16, 16, 4)


def test_the_report_shows_layers_and_what_binds_them(cnn: Bundle) -> None:
    tables = {t["title"]: t for t in cnn.report["generated"]["tables"]}
    layers = tables["Layers"]
    nodes = {row[0] for row in layers["rows"]}
    assert {step for step in nodes if step} and all(
        len(row) == len(layers["columns"]) for row in layers["rows"]
    )
    cycles = sum(row[3] for row in layers["rows"])
    figures = {m["label"]: m["value"] for m in cnn.report["generated"]["measurements"]}
    assert cycles == pytest.approx(int(figures["Cycles of an inference"].replace(",", "")), rel=0.1)
    assert "verified against the TFLite reference kernels" in (cnn.path / "report.html").read_text()


def test_firmware_sources_compile_and_hold_the_file(cnn: Bundle, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler: cc, gcc or clang")
    (tmp_path / "main.c").write_text(
        '#include <stdio.h>\n#include "model_vela.h"\nint main(void) {\n'
        "  fwrite(bitwright_model, 1, bitwright_model_bytes, stdout);\n"
        "  return bitwright_quantize(1e9f, BITWRIGHT_INPUT_0_SCALE, BITWRIGHT_INPUT_0_ZERO_POINT) != 127;\n}\n"
    )
    lib = cnn.path / "lib"
    command = [
        compiler,
        "-std=c11",
        "-Wall",
        "-Werror",
        f"-I{lib}",
        str(tmp_path / "main.c"),
        str(lib / "model_vela.c"),
    ]
    subprocess.run([*command, "-o", str(tmp_path / "main")], check=True)
    printed = subprocess.run([str(tmp_path / "main")], check=True, capture_output=True).stdout
    assert printed == (lib / "model_vela.tflite").read_bytes()


def test_functions_gates_and_views_at_the_end_stay_in_integers(tmp_path: Path) -> None:
    bundle = build(GATED, tmp_path)
    found = verify(bundle.path)
    assert found.passed and found.calls > 0
    assert all(layer["format"] == "int8" for layer in bundle.report["layers"])


def test_an_operator_without_integers_is_refused_with_its_name(tmp_path: Path) -> None:
    text = MLP.replace("y = Gemm(s, w3, b3)", "e = Exp(s)\n  y = Gemm(e, w3, b3)")
    WEIGHTS[text] = WEIGHTS[MLP]
    model = write(text, tmp_path / "model.onnx")
    options = Options(model=model, target=TARGET, data=samples((1, 256)), output=tmp_path / "out")
    with pytest.raises(PerformanceGateError, match="Exp") as raised:
        compile_model(options)
    assert raised.value.exit_code == 6 and not (tmp_path / "out").exists()


def own_profile(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(f"schema: 1\nname: own\nextends: {TARGET}\ndescription: own.\n{text}\n")
    return path


def test_what_does_not_fit_the_device_is_refused(tmp_path: Path) -> None:
    limits = "limits: {ram_bytes: 524288, flash_bytes: 16384}\n"
    source = "provenance: {limits: {source: test, confidence: estimate}}"
    with pytest.raises(InfeasibleBudgetError, match="KiB of flash") as raised:
        build(MLP, tmp_path, own_profile(tmp_path, limits + source))
    assert raised.value.exit_code == 4


RESIZED = """
<ir_version: 8, opset_import: ["" : 17]>
resized (float[1,8,6,6] x) => (float[1,8,18,18] y)
<float[4] scales = {1.0, 1.0, 3.0, 3.0}>
{
  a = Conv(x, w, b)
  y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(a, , scales)
}
"""
WEIGHTS[RESIZED] = {"w": (8, 8, 1, 1), "b": (8,)}


@pytest.mark.parametrize("allowed", [False, True])
def test_what_vela_leaves_to_the_processor_is_refused_unless_allowed(tmp_path: Path, allowed: bool) -> None:
    """The U55 resizes by powers of two: Vela succeeds, and leaves the operator to the processor."""
    model = write(RESIZED, tmp_path / "model.onnx")
    target = own_profile(tmp_path, "vela: {cpu_operators: allowed}") if allowed else TARGET
    options = Options(model=model, target=str(target), data=samples((1, 8, 6, 6)), output=tmp_path / "out")
    if not allowed:
        with pytest.raises(PerformanceGateError, match="leaves 1 operators to the processor"):
            compile_model(options)
        return
    bundle = compile_model(options)
    assert bundle is not None and verify(bundle.path).passed
    assert len(bundle.report["generated"]["not_generated"]) == 1


def test_names_that_no_table_can_hold(tmp_path: Path) -> None:
    """Vela writes tables of commas: names of the model must not break them, nor get lost in the report."""
    proto = onnx.load(write(CNN, tmp_path / "plain.onnx"))
    evil = {name: f'{name},"quoted"\n{name}' for name in ("c1", "r1", "s", "g")}
    for node in proto.graph.node:
        node.name = evil.get(node.output[0], node.output[0])
        node.input[:] = [evil.get(name, name) for name in node.input]
        node.output[:] = [evil.get(name, name) for name in node.output]
    onnx.save(proto, tmp_path / "model.onnx")
    options = Options(
        model=tmp_path / "model.onnx", target=TARGET, data=samples((1, 4, 16, 16)), output=tmp_path / "out"
    )
    bundle = compile_model(options)
    assert bundle is not None and verify(bundle.path).passed
    rows = {t["title"]: t for t in bundle.report["generated"]["tables"]}["Layers"]["rows"]
    assert evil["c1"] in {row[0] for row in rows}


def test_a_failing_vela_is_an_error_of_the_tool(tmp_path: Path, cnn: Bundle) -> None:
    options = load_profile(TARGET).vela
    assert options is not None
    wrong = options.model_copy(update={"system": "No_Such_System"})
    with pytest.raises(ToolchainError):
        compile_file(cnn.path / "lib/model.tflite", wrong, tmp_path, 60)
    with pytest.raises(ToolchainError, match="did not finish"):
        compile_file(cnn.path / "lib/model.tflite", options, tmp_path, 0.01)


def test_fewer_bits_where_the_flash_is_the_limit(tmp_path: Path) -> None:
    """A layer of one row reads every weight once: the flash decides, and Vela's own cycles confirm the plan."""
    (tmp_path / "int8").mkdir()
    whole = build(MLP, tmp_path / "int8").report["generated"]["measurements"]
    cycles = int(next(m["value"] for m in whole if m["label"].startswith("Cycles")).replace(",", ""))
    clock = load_profile(TARGET).clock_hz
    (tmp_path / "low").mkdir()
    limit = 0.6 * cycles / clock
    bundle = build(MLP, tmp_path / "low", recipe="short-mixed", budget={"latency": limit})
    figures = {m["label"]: m["value"] for m in bundle.report["generated"]["measurements"]}
    found = int(figures["Cycles of an inference"].replace(",", ""))
    assert found / clock <= limit * (1 + 1e-9)
    assert verify(bundle.path).passed
    assert any(layer["format"] != "int8" for layer in bundle.report["layers"])


def test_no_fewer_bits_where_the_multipliers_are_the_limit(tmp_path: Path) -> None:
    """As fast as possible whatever it loses: what gains no time keeps its 8 bits all the same."""
    bundle = build(CNN, tmp_path, recipe="short-mixed", budget={"loss": 1e9}, objective="latency")
    formats = {layer["node"]: layer["format"] for layer in bundle.report["layers"] if layer["weight"]}
    rows = {t["title"]: t for t in bundle.report["generated"]["tables"]}["Layers"]["rows"]
    bound = {row[0]: row[5] for row in rows}
    kept = {node for node, fmt in formats.items() if fmt == "int8"}
    assert kept and len(kept) < len(formats), formats
    assert all(bound[node] == "NPU" for node in kept)


def test_a_sweep_shows_what_vela_says(tmp_path: Path) -> None:
    model = write(MLP, tmp_path / "model.onnx")
    options = Options(
        model=model, target=TARGET, data=samples((1, 256)), output=tmp_path / "front", recipe="short-mixed"
    )
    front = sweep_model(options, "artifact", "latency", 3, measure=False)
    seconds = [point.totals.latency_s for point in front.points]
    losses = [point.totals.loss for point in front.points]
    assert seconds == sorted(seconds) and losses == sorted(losses, reverse=True) and len(seconds) > 1
    fewer, whole = front.uniform["w4a8"].totals, front.uniform["int8"].totals
    assert fewer.latency_s < 0.8 * whole.latency_s and fewer.loss > whole.loss


def test_bounds_that_nobody_can_predict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ram"):
        build(MLP, tmp_path, recipe="short-mixed", budget={"ram": 1000.0})


def test_the_command_line_compiles_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write(CNN, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([s["x"] for s in samples((1, 4, 16, 16))]))
    arguments = ["compile", str(model), "--target", TARGET, "--data", str(tmp_path / "data.npz")]
    assert main([*arguments, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/lib/model_vela.tflite").exists()
    assert "TFLite" in capsys.readouterr().err
