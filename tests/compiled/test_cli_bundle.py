"""The command line from a model to a verified bundle, and every verb that reads one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import bitwright
from bitwright.compiler.cli.app import main

TEXT = """
<ir_version: 10, opset_import: ["": 17]>
small (float[N,3,8,8] x) => (float[N,5] y) {
  [first] a = Conv<pads=[1,1,1,1]>(x, w1, b1)
  [relu] b = Relu(a)
  [second] c = Conv<pads=[1,1,1,1]>(b, w2)
  [pool] d = GlobalAveragePool(c)
  [flat] e = Flatten(d)
  [head] f = Gemm(e, w3)
  [soft] y = Softmax(f)
}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (16, 8, 3, 3), "w3": (16, 5)}.items():
        model.graph.initializer.append(
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
        )
    onnx.save(model, folder / "m.onnx")
    np.savez(folder / "data.npz", x=rng.normal(size=(16, 3, 8, 8)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    out = folder / "out"
    code = main(
        [
            "compile",
            str(folder / "m.onnx"),
            "-t",
            "host",
            "-d",
            str(folder / "data.npz"),
            "-o",
            str(out),
            "-q",
        ]
    )
    assert code == 0
    return out


def test_the_page_in_the_bundle_is_the_report(bundle):
    from bitwright.compiler.report.page import render_page

    content = json.loads((bundle / "report.json").read_text())
    assert (bundle / "report.html").read_text() == render_page(content)
    assert content["verification"]["passed"] and content["verification"]["calls"] > 0


def test_verify_executes_every_kernel(bundle, capsys):
    assert main(["verify", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["verification"]
    assert found["executed"] == "native" and found["kernel_differences"] == [] and found["elements"] > 0
    assert main(["verify", str(bundle), "--samples", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "bit for bit" in " ".join(captured.err.split())


def test_a_changed_file_is_found(bundle, folder, capsys, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / "plan.yaml").open("a") as file:
        file.write("\n")
    for verb in (["verify"], ["report"], ["bench"]):
        assert main([*verb, str(copy)]) == 2
        assert "plan.yaml" in capsys.readouterr().err


def test_report_prints_the_page_and_the_tables(bundle, capsys):
    assert main(["report", str(bundle)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{bundle / 'report.html'}\n"
    assert (
        "bit-exact" in captured.err and "first" in captured.err and "Softmax has no integer" in captured.err
    )


def test_explain_follows_a_fused_node(bundle, capsys):
    assert main(["explain", str(bundle), "relu", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["node"] == "first" and row["format"] == "int8" and row["asked"] == "relu"
    assert main(["explain", str(bundle), "soft"]) == 0
    assert "no integer kernel" in capsys.readouterr().err
    assert main(["explain", str(bundle), "sof"]) == 2
    assert "did you mean 'soft'?" in capsys.readouterr().err


def test_bench_times_the_artifact(bundle, folder, capsys):
    assert main(["bench", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["first_s"] > 0 and found["ratio"] == pytest.approx(found["first_s"] / found["second_s"])
    assert main(["bench", str(bundle), str(folder / "m.onnx")]) == 0
    assert float(capsys.readouterr().out) > 0


def test_an_earlier_bundle_is_replaced_and_several_targets_get_folders(folder, bundle, capsys):
    given = ["compile", str(folder / "m.onnx"), "-d", str(folder / "data.npz")]
    many = folder / "many"
    assert main([*given, "-t", "host", "-t", "arm-cortex-a53", "-o", str(many)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(many / "host"), str(many / "arm-cortex-a53")]
    assert main([*given, "-t", "host", "-o", str(many / "host"), "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["outputs"]
    assert made["path"] == str(many / "host") and made["report"]["summary"]["executed"] == "native"


def test_the_python_functions_mirror_the_verbs(folder, tmp_path):
    with np.load(folder / "data.npz") as data:
        samples = {"x": data["x"]}
    made = bitwright.compile(
        folder / "m.onnx", target="host", data=samples, output=tmp_path / "out", keep_float={"head"}
    )
    assert isinstance(made, bitwright.Bundle) and made.path == tmp_path / "out"
    row = next(r for r in made.report["layers"] if r["node"] == "head")
    assert (row["format"], row["reason"]) == ("float", "kept in float on request")
    outputs = made.run({"x": samples["x"][:1]})
    np.testing.assert_allclose(outputs["y"].sum(), 1.0, atol=1e-6)
    deployed = bitwright.quantize(
        folder / "m.onnx", target="host", data=folder / "data.npz", output=tmp_path / "q.onnx", gate=False
    )
    assert deployed.model.is_file() and deployed.session.is_file()
    assert bitwright.inspect(folder / "m.onnx", target="host").integer_share == 1.0


def test_a_metric_of_the_artifact_and_of_its_model(
    folder: Path, bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "metric.py").write_text(
        "import numpy as np\n"
        "x = np.load(__file__.replace('metric.py', 'data.npz'))['x'][:2]\n"
        "def score(run):\n"
        "    return float(run({'x': x[:1]})['y'].max() + run({'x': x[1:]})['y'].max())\n"
    )
    values = []
    for model in (bundle, bundle / "model.onnx", folder / "m.onnx"):
        capfd.readouterr()
        assert main(["evaluate", str(model), "--eval", f"{folder / 'metric.py'}:score"]) == 0
        values.append(float(capfd.readouterr().out))
    x = np.load(folder / "data.npz")["x"][:2]
    artifact = bitwright.Bundle.open(bundle)
    expected = sum(artifact.run({"x": x[k : k + 1]})["y"].max() for k in range(2))
    assert values[0] == pytest.approx(expected, abs=1e-5)  # six digits are printed
    # The integers are the same in both runtimes, the Softmax is float; 8 bits move probabilities by hundredths.
    assert values[1] == pytest.approx(values[0], abs=1e-4)
    assert values[2] == pytest.approx(values[0], abs=0.1)
