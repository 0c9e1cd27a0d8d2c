"""--max-drop on the real model: the layers that cost most move up until the user's metric holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from allocation_models import MLP, SAMPLES, build

from bitwright.compiler.deploy import Deployment, quantize
from bitwright.compiler.errors import AccuracyGateError
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import open_session, run

METRIC = """
import numpy as np
from pathlib import Path
kept = np.load(Path(__file__).with_name("kept.npz"))
def closeness(run):
    y = run({"x": kept["x"]})["y"]
    return float(1 - np.linalg.norm(y - kept["y"]) / np.linalg.norm(kept["y"]))
"""


@pytest.fixture
def metric(tmp_path: Path) -> str:
    model = build(MLP)
    ir.save(model, tmp_path / "m.onnx")
    x = np.random.default_rng(11).standard_normal((1, 4, 64)).astype(np.float32)
    np.savez(tmp_path / "kept.npz", x=x, y=run(open_session(model), {"x": x})["y"])
    (tmp_path / "metric.py").write_text(METRIC)
    return f"{tmp_path / 'metric.py'}:closeness"


def _quantize(metric: str, **options: object) -> Deployment:
    folder = Path(metric).parent
    given = {"target": "x86-avx512-vnni", "data": SAMPLES[MLP], "gate": False, "evaluate": metric, **options}
    return quantize(Options(model=folder / "m.onnx", output=folder / "q.onnx", **given))  # type: ignore[arg-type]


def _formats(made: Deployment) -> list[str]:
    return [row["format"] for row in made.report["layers"] if row["role"] == "anchor"]  # type: ignore[index]


def test_as_few_layers_as_needed_move_up(metric: str) -> None:
    free = _quantize(metric)
    drop = free.report["accuracy"]["drop"]  # type: ignore[index]
    assert drop > 0 and set(_formats(free)) == {"int8"}
    held = _quantize(metric, max_drop=drop * 0.8)
    assert held.report["accuracy"]["drop"] <= drop * 0.8  # type: ignore[index]
    assert set(_formats(held)) == {"int8", "float"}
    notes = [n for p in held.report["phases"] if p["name"] == "accuracy" for n in p["notes"]]  # type: ignore[index]
    assert any("moves made" in note for note in notes)
    # The written file is the one that was measured.
    kept = np.load(Path(metric).with_name("kept.npz"))
    y = run(open_session(held.model), {"x": kept["x"]})["y"]
    found = 1 - np.linalg.norm(y - kept["y"]) / np.linalg.norm(kept["y"])
    assert found == pytest.approx(held.report["accuracy"]["quantized_value"], abs=1e-6)  # type: ignore[index]


def test_a_bound_that_the_budget_forbids_says_what_is_reachable(metric: str) -> None:
    with pytest.raises(AccuracyGateError) as caught:
        _quantize(metric, max_drop=1e-7, budget={"size": 40000.0})
    assert caught.value.exit_code == 5
    assert "reachable is" in caught.value.message
    assert not Path(metric).with_name("q.onnx").exists()
