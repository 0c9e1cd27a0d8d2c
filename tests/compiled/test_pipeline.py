"""The whole of ``compile`` on a small model: what lands in the output folder, and that it computes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml
from plan_models import CNN, build

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.errors import AccuracyGateError, BitwrightError, DataError, UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model

# Phases that write, and how long after the start of each the process lives at most: the bundle appears at the end of
# the last one.
KILLED = (("lower", 2.0), ("emit", 0.3), ("verify", 0.4), ("verify", 0.8))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "cnn.onnx"
    onnx.save(ir.to_proto(build(CNN)), path)
    return path


def samples(count: int = 16) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def options(model: Path, out: Path, **changes: object) -> Options:
    return Options(model=model, data=samples(), output=out, **{"target": "host", **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bundle(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    made = compile_model(options(model_path, tmp_path_factory.mktemp("compiled") / "out"))
    assert made is not None
    return made


def test_the_output_folder_is_complete(bundle: Bundle) -> None:
    for name in (
        "model.onnx",
        "model.session.json",
        "plan.yaml",
        "report.json",
        "report.html",
        "lib/model.so",
        "lib/runner.cc",
        "golden/inputs_0.npz",
        "golden/outputs_0.npz",
    ):
        assert name in bundle.manifest.files, name
    assert (bundle.path / "manifest.json").exists()
    assert not list(bundle.path.parent.glob(".*tmp*")), "no temporary folder is left"


def test_the_artifact_and_onnxruntime_agree(bundle: Bundle) -> None:
    for sample in samples(4):
        artifact = bundle.run(sample)["y"]
        reference = bundle.run(sample, "ort")["y"]
        # Same integers up to the logits; the Softmax island is float code of two runtimes.
        np.testing.assert_allclose(artifact, reference, atol=1e-5)


def test_it_verifies_again_from_disk(bundle: Bundle) -> None:
    result = verify(bundle.path)
    assert result.executed == "native"
    assert result.passed
    assert result.calls > 0 and result.elements > 0


def test_plan_and_report_tell_the_same_story(bundle: Bundle) -> None:
    plan = yaml.safe_load(bundle.plan_text)
    report = bundle.report
    integer = {row["node"] for row in plan["nodes"] if row["format"] == "int8"}
    assert integer == {row["node"] for row in report["layers"] if row["format"] == "int8"}
    assert report["summary"]["integer_anchors"] == report["summary"]["anchors"] == 3
    assert report["verification"]["passed"] is True
    assert {row["node"] for row in report["float"]} == {"y"}
    assert report["summary"]["bytes"] < report["summary"]["float_bytes"]


def test_compiling_twice_gives_the_same_library_and_model(
    bundle: Bundle, model_path: Path, tmp_path: Path
) -> None:
    again = compile_model(options(model_path, tmp_path / "again"))
    assert again is not None
    for name in ("model.onnx", "plan.yaml", "lib/model.so", "lib/kernels.json", "golden/outputs_0.npz"):
        assert (again.path / name).read_bytes() == (bundle.path / name).read_bytes(), name


def test_a_new_device_is_ten_lines_of_yaml(model_path: Path, tmp_path: Path) -> None:
    profile = tmp_path / "my-board.yaml"
    profile.write_text(
        """\
schema: 1
name: my-board
extends: x86-avx2
description: A small board with one slow core
clock_hz: 1.2e+9
cores: 1
limits: {ram_bytes: 5.0e+8}
provenance:
  clock_hz: {source: the board's manual, confidence: datasheet}
  limits: {source: the board's manual, confidence: datasheet}
"""
    )
    assert len(profile.read_text().splitlines()) == 10
    made = compile_model(options(model_path, tmp_path / "out", target=str(profile)))
    assert made is not None
    assert made.profile.name == "my-board"
    assert made.report["verification"]["passed"] is True


def test_stopping_early_writes_nothing_but_the_dump(model_path: Path, tmp_path: Path) -> None:
    result = compile_model(
        options(model_path, tmp_path / "out", stop_after="quantize", dump=tmp_path / "dump")
    )
    assert result is None
    assert not (tmp_path / "out").exists()
    dumped = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert dumped[-1].endswith("quantize.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "dump" / dumped[-1]), full_check=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "x86-avx22"}, BitwrightError, "x86-avx2"),
        ({"dims": {"N": 4}}, UsageError, "no dynamic dimension"),
        ({"keep_float": frozenset({"c3"})}, UsageError, "known: c1, c2"),
        ({"method": "minmaks"}, UsageError, "did you mean 'minmax'"),
        ({"data": [{"x": np.full((1, 3, 8, 8), np.nan, np.float32)}]}, DataError, "x"),
        ({"data": [{"z": np.zeros((1, 3, 8, 8), np.float32)}]}, DataError, "x"),
    ],
)
def test_what_is_wrong_is_refused_and_nothing_is_written(
    model_path: Path, tmp_path: Path, changes: dict[str, object], error: type[BitwrightError], message: str
) -> None:
    with pytest.raises(error, match=message):
        compile_model(
            Options(
                model=model_path, output=tmp_path / "out", **{"target": "host", "data": samples(), **changes}
            )
        )  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_accuracy_gate_closes(model_path: Path, tmp_path: Path) -> None:
    metric = tmp_path / "metric.py"
    # A metric that falls as soon as the output moves at all.
    metric.write_text(
        "import numpy as np\n"
        "first = []\n"
        "def score(run):\n"
        "    y = run({'x': np.ones((1, 3, 8, 8), np.float32)})['y']\n"
        "    first.append(y)\n"
        "    return 1.0 if np.array_equal(y, first[0]) and len(first) == 1 else 0.5\n"
    )
    with pytest.raises(AccuracyGateError, match="a drop of 50"):
        compile_model(options(model_path, tmp_path / "out", evaluate=f"{metric}:score", max_drop=0.01))
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_never_overwritten(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError):
        compile_model(options(model_path, tmp_path / "out"))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "precious"


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from test_pipeline import compile_model, options
class Told:
    def phase(self, name): print(name, flush=True)
    def step(self, *_): pass
    def note(self, _): pass
compile_model(options(Path(sys.argv[1]), Path(sys.argv[2])), Told())
"""


def test_kill_9_leaves_the_whole_output_or_none(model_path: Path, tmp_path: Path) -> None:
    """Kill a compilation while it writes: a bundle that is there must open, hashes and all."""
    out = tmp_path / "out"
    moments = random.Random(0)
    here = Path(__file__).parent
    helpers = [str(here), str(here.parent / "null")]
    for phase, longest_s in KILLED:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(model_path), str(out), *helpers],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        assert child.stdout is not None
        assert phase in map(str.strip, child.stdout)
        time.sleep(moments.uniform(0, longest_s))
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if out.exists():
            Bundle.open(out)
    made = compile_model(options(model_path, out))
    assert made is not None
    assert json.loads((out / "report.json").read_text())["verification"]["passed"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "what the killed runs left is cleaned up"
