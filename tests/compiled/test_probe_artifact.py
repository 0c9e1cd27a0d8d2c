"""``targets probe --runtime artifact``: kernels of compiled artifacts, timed one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.plan.latency import predict
from bitwright.compiler.plan.planner import plan_selection
from bitwright.compiler.probing.blocks import blocks
from bitwright.compiler.probing.placements import prepare, uniform
from bitwright.compiler.probing.probe import probe
from bitwright.targets.loader import load_profile


def test_kernels_of_an_artifact_are_timed_and_written(tmp_path: Path) -> None:
    try:
        load_profile("host")
    except ProfileError as error:
        pytest.skip(f"no profile of this machine: {error.what}")
    block = next(b for b in blocks() if b.label == "convolutions 16x8x8 to 16x16x16")
    model = tmp_path / "block.onnx"
    save_model(block.model(), model)
    found = probe("host", runtime="artifact", model=model, output=tmp_path / "mine.yaml", seconds=1.0)
    assert found.profile.measured is not None and found.profile.measured.onnxruntime is None
    times = found.profile.measured.artifact
    assert times is not None and "float" in times.times["Conv"]
    assert all(seconds > 0 for seconds in times.times["Conv"]["float"].values())
    c = prepare(found.profile, model, data=None, dims={}, threads=1)
    assert c.model is not None
    selection = plan_selection(c.model, found.profile, "artifact", c.shapes, formats=uniform("float"))
    assert predict(selection, found.profile, "artifact", c.shapes).origin == "measured"
