"""Real models from file to verified artifact and to ONNX Runtime, accuracy on samples that did not calibrate."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from bitwright.compiler.deploy import quantize
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif("BITWRIGHT_ZOO" not in os.environ, reason="BITWRIGHT_ZOO names no model collection"),
]

SMALL = ("kws_dscnn", "resnet8_cifar10", "vww_mobilenet", "ad_autoencoder")


def runner(path: Path) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    session = open_session(path)
    return lambda feeds: run(session, feeds)


@cache
def float_metric(name: str) -> float:
    import zoo  # reads BITWRIGHT_ZOO

    entry = zoo.model_named(name)
    return entry.evaluate(runner(entry.path))


def reaches(name: str, model: Path) -> None:
    """Check the model's task metric against what eight bits must keep."""
    import zoo  # reads BITWRIGHT_ZOO

    entry = zoo.model_named(name)
    before, after = float_metric(name), entry.evaluate(runner(model))
    bound = entry.bound(before)
    assert after >= bound if entry.higher_is_better else after <= bound, (name, before, after, bound)


def options(name: str, target: str, output: Path, most: int | None = None, **changes: object) -> Options:
    import zoo

    entry = zoo.model_named(name)
    data = list(islice(entry.samples(), most))
    return Options(model=entry.path, target=target, data=data, output=output, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["host", "arm-cortex-a76"])
@pytest.mark.parametrize("name", SMALL)
def test_the_artifact_is_exact_and_accurate(name: str, target: str, tmp_path: Path) -> None:
    bundle = compile_model(options(name, target, tmp_path / "out"))
    assert bundle is not None
    found = bundle.report["verification"]
    profile = load_profile(target)
    if backend_for(profile.family).why_not_executable(profile) is None:
        assert found["executed"] == ("native" if target == "host" else "emulated")
        assert found["calls"] > 0
    assert found["passed"]
    assert bundle.report["summary"]["integer_macs_share"] == 1.0
    reaches(name, bundle.path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tinylm", "ppocr_rec"])
def test_models_with_float_islands_compile_exactly(name: str, tmp_path: Path) -> None:
    # 16 samples are enough for their accuracy; what is examined here is the artifact.
    bundle = compile_model(options(name, "host", tmp_path / "out", most=16))
    assert bundle is not None
    found = bundle.report["verification"]
    assert found["passed"] and found["executed"] == "native" and found["calls"] > 100
    assert any("attention product" in row["reason"] for row in bundle.report["float"])
    reaches(name, bundle.path / "model.onnx")


@pytest.mark.parametrize("name", SMALL)
def test_the_deployment_is_accurate_and_fully_fused(name: str, tmp_path: Path) -> None:
    made = quantize(options(name, "host", tmp_path / "q.onnx", gate=False))
    report = made.report
    assert isinstance(report["audit"], dict)
    assert [f for f in report["audit"]["findings"] if not f["harmless"]] == []
    reaches(name, made.model)
