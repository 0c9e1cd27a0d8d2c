"""The networks of MLPerf Tiny on an Ethos-U: everything on the accelerator, every layer equal to its integer model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from zoo import model_named

from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model

for package in ("ethosu.vela", "ai_edge_litert", "flatbuffers"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'bitwright[ethos-u]'")

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(
        "BITWRIGHT_ZOO" not in os.environ, reason="needs the real models: set BITWRIGHT_ZOO to their folder"
    ),
]
# Operators of the file that compute something; the rest moves data or is merged.
LAYERS = {"kws_dscnn": 12, "resnet8_cifar10": 15, "vww_mobilenet": 30, "ad_autoencoder": 10}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("kws_dscnn", "ethos-u85-256"),
        ("resnet8_cifar10", "ethos-u55-128"),
        ("vww_mobilenet", "ethos-u55-128"),
        ("ad_autoencoder", "ethos-u65-512"),
    ],
)
def test_everything_runs_on_the_accelerator_and_every_layer_is_equal(
    name: str, target: str, tmp_path: Path
) -> None:
    model = model_named(name)
    samples = [sample for sample, _ in zip(model.samples(), range(8), strict=False)]
    options = Options(
        model=model.path,
        data=samples,
        target=target,
        dims={"N": 1},
        output=tmp_path / "out",
        recipe="int8-nearest",
        golden=1,
    )
    bundle = compile_model(options)
    assert bundle is not None
    figures = {m["label"]: m["value"] for m in bundle.report["generated"]["measurements"]}
    assert figures["Operators on the accelerator"] == "100%"
    found = bundle.report["verification"]
    assert found["passed"] and found["calls"] == LAYERS[name]
    steps = max(o["difference"]["largest"] for o in found["outputs"])
    scale = {
        row[1]: row[4]
        for t in bundle.report["generated"]["tables"]
        for row in t["rows"]
        if row[0] == "output"
    }
    # Roundings in a row may add up; a wrong layer would be off by a large part of the range.
    assert steps <= 25 * scale["output"]
