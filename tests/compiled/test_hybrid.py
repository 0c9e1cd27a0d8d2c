"""Models with an operator that TVM lacks: libraries around an ONNX file, executed and verified as one artifact."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from recurrent_model import samples, save, save_recurrent

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.verify import verify, verify_folder
from bitwright.compiler.errors import DataError, ModelError
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="executes x86-64 code")

# The products are exact; GRU and Sigmoid round differently in the last bits. A GRU output (between -1 and 1, so a step
# of its quantizer is at most 2/255) at a tie then moves by one step, times a weight of the head (below 1).
BOUNDS = {"y": 2 / 255, "s": 1e-6}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    profile = load_profile("x86-avx2")
    reason = backend_for(profile.family).why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hybrid")
    out, model = folder / "out", save_recurrent(folder / "model.onnx")
    made = compile_model(Options(model=model, data=samples(), output=out, target="x86-avx2"))
    assert made is not None
    return made


def test_libraries_surround_the_operator(bundle: Bundle) -> None:
    assert bundle.segments is not None
    executors = [segment.executor for segment in bundle.segments.segments]
    assert executors == ["kernels", "onnxruntime", "kernels"]
    files = set(bundle.manifest.files)
    assert {"lib/segment_0/model.so", "lib/segment_1.onnx", "lib/segment_2/model.so"} <= files
    assert "lib/model.so" not in files and "lib/kernels.json" not in files
    assert [f for f in files if f.endswith("runner")] == ["lib/runner"], "the runner is shared"
    left = onnx.load(bundle.path / "lib/segment_1.onnx")
    assert {n.op_type for n in left.graph.node} - {"Squeeze", "Constant"} == {"GRU"}
    assert "segments.json" in (bundle.path / "lib/README.md").read_text()


def test_all_kernels_of_all_segments_are_verified(bundle: Bundle) -> None:
    found = verify(bundle.path)
    found.check()
    assert (found.executed, found.sets) == ("native", 2)
    tables = [json.loads((bundle.path / f"lib/segment_{k}/kernels.json").read_text()) for k in (0, 2)]
    operations = [{call["operation"] for call in table["calls"]} for table in tables]
    assert all("QGemm" in names for names in operations), "both products are integer kernels"
    assert found.calls == found.sets * sum(len(table["calls"]) for table in tables)
    (left,) = found.not_lowered
    assert "gru" in left.nodes and "GRU" in left.operators
    assert "ran in ONNX Runtime on this machine" in found.lines()[1]
    assert found.seconds > 0


def test_a_wrong_weight_in_any_library_is_found(bundle: Bundle, tmp_path: Path) -> None:
    """The reference is the static model: with another weight there, the last library is what differs."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    model = onnx.load(copy / "lib/model.static.onnx")
    weight = next(
        i for i in model.graph.initializer if i.name.startswith("wb") and i.data_type == onnx.TensorProto.INT8
    )
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, copy / "lib/model.static.onnx")
    found = verify_folder(copy, bundle.profile, samples=1)
    assert [d.step for d in found.kernel_differences] == ["head"]


def test_the_artifact_computes_what_the_model_does(bundle: Bundle) -> None:
    for feeds in samples(3):
        artifact, ort = bundle.run(feeds), bundle.run(feeds, "ort")
        assert list(artifact) == ["y", "s"]
        for name, value in artifact.items():
            np.testing.assert_allclose(value, ort[name], rtol=0, atol=BOUNDS[name])
    traced = bundle.execute(samples(1)[0], trace=True, repeat=2)
    assert traced.executed == "native"
    assert traced.seconds > 0 and len(traced.trace) > 0


def test_inputs_are_checked_before_anything_runs(bundle: Bundle) -> None:
    with pytest.raises(DataError, match="no input 'z'"):
        bundle.run({"z": np.zeros(1, "float32")})
    with pytest.raises(DataError, match="expected shape"):
        bundle.run({"x": np.zeros((1, 1, 32), "float32")})


def test_the_report_says_so(bundle: Bundle) -> None:
    (left,) = bundle.report["not_lowered"]
    assert "gru" in left["nodes"] and "GRU" in left["operators"] and "GRU" in left["reason"]
    lower = next(p for p in bundle.report["phases"] if p["name"] == "lower")
    assert any("left to ONNX Runtime" in note and "GRU" in note for note in lower["notes"])
    assert bundle.report["verification"]["passed"] is True
    page = (bundle.path / "report.html").read_text()
    assert "Left to ONNX Runtime" in page


def test_compiling_twice_gives_the_same_files(bundle: Bundle, tmp_path: Path) -> None:
    model = save_recurrent(tmp_path / "model.onnx")
    again = compile_model(Options(model=model, data=samples(), output=tmp_path / "out", target="x86-avx2"))
    assert again is not None
    both = [
        {n: r for n, r in b.manifest.files.items() if n.startswith("lib/segment")} for b in (bundle, again)
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 1 + 1 + 2 * 4, "the list, the ONNX file, and four files for each library"


def test_a_model_of_nothing_else_is_one_onnx_file(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[6, 1, 32] x) => (float[6, 1, 1, 16] y) { [gru] y = GRU <hidden_size = 16> (x, w, r) }"""
    generator = np.random.default_rng(0)
    w, r = (generator.normal(0, 0.2, (1, 48, k)).astype("float32") for k in (32, 16))
    path = save(tmp_path / "gru.onnx", text, w=w, r=r)
    made = compile_model(Options(model=path, data=samples(), output=tmp_path / "out", target="x86-avx2"))
    assert made is not None and made.segments is not None
    assert [s.path for s in made.segments.segments] == ["segment_0.onnx"]
    found = verify(made.path)
    assert (found.executed, found.calls) == ("onnxruntime", 0)
    assert "nothing of the model is in a library" in found.lines()[0]


def test_an_output_of_dynamic_shape_is_refused_by_name(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4, 16] x, int64 trips) => (float[4, 16] y, float[K, 4, 16] all) <bool go = {1}>
    { [loop] y, all = Loop (trips, go, x) <body = b (int64 i, bool c, float[4, 16] h)
        => (bool d, float[4, 16] k, float[4, 16] t) { d = Identity(c) k = Tanh(h) t = Identity(k) }> }"""
    path = save(tmp_path / "loop.onnx", text)
    options = Options(model=path, random_data=True, output=tmp_path / "out", target="x86-avx2")
    with pytest.raises(ModelError, match=r"output 'all': .*node 'loop' \(Loop\).*input 'trips'"):
        compile_model(options)
    assert not (tmp_path / "out").exists()
