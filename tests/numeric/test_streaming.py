"""Models that are quantized part by part: the same integers as at once, everything in its place, in bounded memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import yaml
from llama_models import llama_model
from onnx import numpy_helper
from streaming_cases import SIZES, arrays, feeds_of, logits, options

from bitwright.compiler.cli.app import main
from bitwright.compiler.deploy import Deployment, quantize
from bitwright.compiler.errors import BitwrightError, ModelError, UsageError
from bitwright.compiler.streaming import decision

NEAREST = """
schema: 1
name: nearest
formats: [w4]
migrate: {equalize: false, smooth: false, disassemble: 0.0}
rounding: {scales: mse, method: nearest}
"""


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """The same model quantized as a whole."""
    return quantize(options(tmp_path_factory.mktemp("whole"), llama_model(SIZES), stream="off"))


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return quantize(options(tmp_path_factory.mktemp("streamed"), llama_model(SIZES)))


def test_same_integers_as_at_once_by_gptq(at_once: Deployment, streamed: Deployment) -> None:
    """Both see the float model's inputs, so every weight, scale and zero point is the same, to the last bit."""
    expected, found = arrays(at_once.model), arrays(streamed.model)
    assert sorted(expected) == sorted(found)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_same_nodes_and_outputs_as_at_once(at_once: Deployment, streamed: Deployment) -> None:
    kinds = [sorted(n.op_type for n in onnx.load(d.model).graph.node) for d in (at_once, streamed)]
    assert kinds[0] == kinds[1]
    feeds = feeds_of(SIZES)
    np.testing.assert_array_equal(logits(streamed.model, feeds), logits(at_once.model, feeds))


def test_weights_are_external_and_nothing_is_left_behind(streamed: Deployment) -> None:
    folder = streamed.model.parent
    names = sorted(p.name for p in folder.iterdir())
    beside = ["q.onnx", "q.onnx.data", "q.plan.yaml", "q.report.json", "q.session.json"]
    assert names == ["model.onnx", *beside, "tokens.npz"]
    large = [t for t in onnx.load(streamed.model, load_external_data=False).graph.initializer if t.dims]
    external = [t for t in large if t.data_location == onnx.TensorProto.EXTERNAL]
    assert {e.value for t in external for e in t.external_data if e.key == "location"} == {"q.onnx.data"}
    assert max(len(t.raw_data) for t in large) <= 1024
    onnx.checker.check_model(str(streamed.model))


def test_report_has_every_layer_with_its_errors(at_once: Deployment, streamed: Deployment) -> None:
    report = streamed.report
    assert json.loads(json.dumps(report)) == json.loads(streamed.report_file.read_text())
    rows = {row["node"]: row for row in report["layers"]}
    assert list(rows) == [row["node"] for row in at_once.report["layers"]]
    for row in at_once.report["layers"]:
        found = rows[row["node"]]
        assert (found["format"], found["macs"], found["weight_quant"]) == (
            row["format"], row["macs"], row["weight_quant"]
        )  # fmt: skip
        if row["own_sqnr_db"] is not None and row["role"] == "anchor":
            # The same errors on the same samples; kernels round inputs to 8 bits, so last bits become steps.
            assert found["own_sqnr_db"] == pytest.approx(row["own_sqnr_db"], abs=0.5)
            assert found["sqnr_db"] == pytest.approx(row["sqnr_db"], abs=0.5)
    summary, whole = report["summary"], at_once.report["summary"]
    for key in ("anchors", "quantized_anchors", "macs", "formats", "parameters_by_bits", "bytes"):
        assert summary[key] == whole[key], key
    assert summary["output_sqnr_db"]["scores"] == pytest.approx(whole["output_sqnr_db"]["scores"], abs=0.5)
    assert report["streaming"]["parts"] == 6
    assert len(report["streaming"]["left_out"]) == 3


def test_explain_names_the_layers_that_add_most(
    streamed: Deployment, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["explain", str(streamed.model)]) == 0
    rows = [r for r in streamed.report["layers"] if r["own_sqnr_db"] is not None]
    worst = min(rows, key=lambda row: row["own_sqnr_db"])
    found = capsys.readouterr()
    lines = [text for text in (found.out + found.err).splitlines() if " dB" in text]
    assert worst["node"] in lines[0]
    assert f"{worst['own_sqnr_db']:.1f} dB" in lines[0]


def test_plan_is_accepted_again(streamed: Deployment, tmp_path: Path) -> None:
    plan = yaml.safe_load(streamed.plan.read_text())
    label = next(n["node"] for n in plan["nodes"] if n["format"] == "w4")
    text = streamed.plan.read_text().replace("format: w4", "format: float", 1)
    (tmp_path / "plan.yaml").write_text(text)
    again = quantize(options(tmp_path, llama_model(SIZES), recipe=str(tmp_path / "plan.yaml")))
    formats = {row["node"]: row["format"] for row in again.report["layers"]}
    assert formats[label] == "float"
    assert sum(f == "w4" for f in formats.values()) == streamed.report["summary"]["formats"]["w4"] - 1


def test_same_integers_rounded_to_nearest(tmp_path: Path) -> None:
    """Tied weights, no cache; attention is fused behind both."""
    sizes = replace(SIZES, tied=True, cache=False, fused_attention=True)
    (tmp_path / "nearest.yaml").write_text(NEAREST)
    found = []
    for way in ("off", "float"):
        (tmp_path / way).mkdir()
        recipe = tmp_path / "nearest.yaml"
        asked = options(tmp_path / way, llama_model(sizes), sizes, recipe=str(recipe), stream=way)
        made = quantize(asked).model
        found.append(arrays(made))
        kinds = [n.op_type for n in onnx.load(made, load_external_data=False).graph.node]
        assert kinds.count("GroupQueryAttention") == sizes.layers
    quantized = [name for name in found[0] if "quantized" in name]
    assert quantized
    for name in quantized:
        np.testing.assert_array_equal(found[1][name], found[0][name], err_msg=name)


def test_sequential_calibration_sees_quantized_inputs(streamed: Deployment, tmp_path: Path) -> None:
    """Behind the first quantized layer inputs are others, so integers are; the errors stay of the same size."""
    sequential = quantize(options(tmp_path, llama_model(SIZES), stream="quantized"))
    expected, found = arrays(streamed.model), arrays(sequential.model)
    same = [n for n in expected if n.endswith("_quantized") and np.array_equal(expected[n], found[n])]
    assert same  # the first attention and the table
    assert len(same) < sum(n.endswith("_quantized") for n in expected)
    assert sequential.report["streaming"]["way"] == "quantized"
    before, after = (d.report["summary"]["output_sqnr_db"]["scores"] for d in (streamed, sequential))
    assert after > before - 2.0


def test_half_precision_models_pass_float32_between_parts(tmp_path: Path) -> None:
    sizes = replace(SIZES, cache=False)
    model = half(llama_model(sizes))
    made = quantize(options(tmp_path, model, sizes, stream="quantized"))
    stored = onnx.load(made.model, load_external_data=False)
    kinds = {t.data_type for t in stored.graph.initializer}
    assert onnx.TensorProto.FLOAT16 not in kinds
    casts = [n for n in stored.graph.node if n.op_type == "Cast"]
    assert all(a.i != onnx.TensorProto.FLOAT16 for n in casts for a in n.attribute if n.output[0] != "scores")
    feeds = feeds_of(sizes)
    exact = logits(tmp_path / "model.onnx", feeds).astype(np.float32)
    noise = logits(made.model, feeds).astype(np.float32) - exact
    assert np.sum(noise**2) < 0.05 * np.sum(exact**2)  # 4 bits lose 15 to 20 dB on random weights


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose floats have 16 bits, outputs included."""
    found = onnx.ModelProto()
    found.CopyFrom(model)
    for tensor in found.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = np.clip(numpy_helper.to_array(tensor), -6e4, 6e4).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in found.graph.output:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    return found


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"recipe": "int8"}, "--recipe", "int8 passes between layers"),
        ({"recipe": "fp16"}, "--recipe", "fp16 passes between layers"),
        ({"recipe": "w4", "budget": {"bits": 4.5}}, "--stream", "judged by the outputs of the whole model"),
        ({"evaluate": "metric.py:score"}, "--eval", "a metric needs the whole model"),
        ({"keep_float": frozenset(["nothing"])}, "--keep-float", "the model has no node 'nothing'"),
    ],
)
def test_what_cannot_be_streamed_is_refused(
    changes: dict[str, object], where: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / "metric.py").write_text("def score(run):\n    return 0.0\n")
    if "evaluate" in changes:
        changes = {"evaluate": f"{tmp_path / 'metric.py'}:score"}
    with pytest.raises(UsageError, match=what) as caught:
        quantize(options(tmp_path, llama_model(SIZES), **changes))
    assert caught.value.where == where
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metric.py", "model.onnx", "tokens.npz"]


def test_an_unknown_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown way 'sideways'"):
        options(tmp_path, llama_model(SIZES), stream="sideways")


def test_a_model_that_is_no_chain_is_refused(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[N, 32] x) => (float[N, 32] y)'
        "{ a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b) }"
    )
    for name in "wv":
        model.graph.initializer.append(numpy_helper.from_array(np.eye(32, dtype=np.float32), name))
    asked = replace(options(tmp_path, model), data=[{"x": np.ones((1, 32), np.float32)}])
    with pytest.raises(ModelError, match="no value inside passes everything on"):
        quantize(asked)


def test_weights_that_are_not_finite_leave_nothing_behind(tmp_path: Path) -> None:
    model = llama_model(SIZES)
    for tensor in model.graph.initializer:
        if tensor.name == "w_u1":
            array = numpy_helper.to_array(tensor).copy()
            array[0, 0] = np.inf
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(BitwrightError):
        quantize(options(tmp_path, model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "tokens.npz"]


class Notes:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def phase(self, name: str) -> None:
        """Nothing to do."""

    def step(self, done: int, total: int, what: str) -> None:
        """Nothing to do."""

    def note(self, text: str) -> None:
        """Keep it."""
        self.notes.append(text)


def test_large_models_are_streamed_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama_model(SIZES)
    weights = sum(numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    assert not decision.is_large(weights)

    class Memory:
        available = 3 * weights

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    made = quantize(options(tmp_path, model, stream="auto"))
    assert made.report["streaming"]["way"] == "quantized"
    progress = Notes()
    made = quantize(options(tmp_path, model, stream="auto", recipe="int8-nearest"), progress)
    assert "streaming" not in made.report
    assert any("is not streamed: the format int8 passes between layers" in note for note in progress.notes)
