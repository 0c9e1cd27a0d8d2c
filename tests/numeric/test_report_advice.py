"""What a report advises: it names the layer that was made bad, its patch applies, and the outputs gain by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import yaml
from onnx import numpy_helper

from bitwright.compiler.cli.app import main
from bitwright.compiler.deploy import Deployment, quantize
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import config_for, open_session, run
from bitwright.compiler.ort.what_if import WhatIf
from bitwright.compiler.report.advice import blamed
from bitwright.compiler.report.page import render_page
from bitwright.targets.loader import load_profile

TARGET = "x86-avx512-vnni"
# The middle layer's input has one channel a hundred times larger, which only that layer's zero weights ignore: with
# one scale for all channels the others are left with a few steps.
MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
mlp (float[1,8,64] x) => (float[1,8,32] y)
{
  [first] a = MatMul(x, wa)
  [soft] sa = Tanh(a)
  [grow] ga = Mul(sa, big)
  [bad] b = MatMul(ga, wb)
  [squash] sb = Tanh(b)
  [last] y = MatMul(sb, wc)
}
"""


def build(path: Path, outlier: float = 100.0) -> Path:
    rng = np.random.default_rng(3)
    weights = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        for name, shape in {"wa": (64, 64), "wb": (64, 64), "wc": (64, 32)}.items()
    }
    weights["big"] = np.ones(64, np.float32)
    weights["big"][7], weights["wb"][7] = outlier, 0
    proto = onnx.parser.parse_model(MODEL)
    proto.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    ir.save(ir.from_proto(proto), path)
    return path


SAMPLES = [{"x": np.random.default_rng(k).standard_normal((1, 8, 64)).astype(np.float32)} for k in range(8)]


def made(folder: Path, recipe: str, **options: Any) -> Deployment:
    model = build(folder / "m.onnx")
    given = {"target": TARGET, "data": SAMPLES, "gate": False, "output": folder / "q.onnx"} | options
    return quantize(Options(model=model, recipe=recipe, **given))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    # Nothing migrates the outlier away.
    return made(tmp_path_factory.mktemp("bad"), "int8-nearest")


def decibel(deployment: Deployment) -> float:
    config = config_for(load_profile(TARGET).runtimes.onnxruntime)
    exact, found = (
        np.concatenate([run(open_session(path, cfg), s)["y"].ravel() for s in SAMPLES]).astype(np.float64)
        for path, cfg in ((deployment.model.with_name("m.onnx"), None), (deployment.model, config))
    )
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


def row(report: dict[str, Any], section: str, node: str) -> dict[str, Any]:
    found: dict[str, Any] = next(r for r in report[section] if r["node"] == node)
    return found


def test_the_bad_layer_is_named_with_the_part_to_blame(bad: Deployment) -> None:
    first: dict[str, Any] = bad.report["advice"][0]  # type: ignore[index]
    assert first["node"] == "bad" and first["blame"] == "inputs"
    # Its inputs cost nearly all of the noise: a hundredth of the range is left to 63 of 64 channels.
    assert first["gain_db"] > 10 and first["inputs_db"] > 5 > first["weights_db"]
    assert first["own_sqnr_db"] == row(bad.report, "layers", "bad")["own_sqnr_db"]


def test_own_error_tells_the_culprit_from_its_heirs(bad: Deployment) -> None:
    culprit, heir = (row(bad.report, "layers", name) for name in ("bad", "last"))
    assert culprit["own_sqnr_db"] < 15 < 30 < heir["own_sqnr_db"]
    assert heir["sqnr_db"] < 20  # inherited


def test_following_the_patch_gives_what_was_promised(bad: Deployment, tmp_path: Path, capsys: Any) -> None:
    first: dict[str, Any] = bad.report["advice"][0]  # type: ignore[index]
    better = tmp_path / "better.plan.yaml"
    assert main(["explain", str(bad.model), "bad", "--apply", str(better)]) == 0
    assert capsys.readouterr().out == f"{better}\n"
    nodes = {n["node"]: n["format"] for n in yaml.safe_load(better.read_text())["nodes"]}
    assert nodes["bad"] == first["change"] != "int8"
    after = made(tmp_path, str(better))
    assert row(after.report, "layers", "bad")["format"] == first["change"]
    # The measured gain is that of float; the advised format must give most of it.
    assert decibel(after) - decibel(bad) > 0.7 * first["gain_db"]


def test_the_patch_in_the_report_is_the_change_that_is_applied(bad: Deployment, tmp_path: Path) -> None:
    better = tmp_path / "better.plan.yaml"
    assert main(["explain", str(bad.model), "--apply", str(better), "--json"]) == 0
    old, new = bad.plan.read_text().splitlines(), better.read_text().splitlines()
    changed = {k + 1: pair for k, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1]}
    advised = [a for a in bad.report["advice"] if a["patch"]]  # type: ignore[attr-defined]
    assert len(changed) == len(advised) >= 1
    for advice in advised:
        minus, plus = (next(x[1:] for x in advice["patch"].splitlines()[2:] if x[0] == sign) for sign in "-+")
        assert (minus, plus) in changed.values()
        assert advice["command"].endswith("--recipe better.plan.yaml") and "--no-gate" in advice["command"]


def test_the_report_beside_the_model_is_the_report(bad: Deployment) -> None:
    assert json.loads(bad.report_file.read_text()) == json.loads(json.dumps(bad.report))


def test_explain_shows_own_and_accumulated_error(bad: Deployment, capsys: Any) -> None:
    assert main(["explain", str(bad.model), "bad"]) == 0
    err = capsys.readouterr().err
    for words in ("Own SQNR", "Accumulated SQNR", "8 bits for each channel (int8, 64 scales)", "+  format:"):
        assert words in err
    assert main(["explain", str(bad.model), "bad", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["advice"]["node"] == "bad" and found["weight_quant"]["granularity"] == "channel"


@pytest.mark.parametrize(
    ("recipe", "granularity", "text"),
    [
        ("w4", "group", "4 bits in groups of 32 (uint4, 128 scales)"),
        ("nf4", "group", "values of the table nf4 in groups of 64"),
        ("fp16-weights", "none", "16 bits (float16), not scaled"),
    ],
)
def test_weight_formats_in_words(
    recipe: str, granularity: str, text: str, tmp_path: Path, capsys: Any
) -> None:
    found = made(tmp_path, recipe)
    weight = row(found.report, "layers", "bad")["weight_quant"]
    assert weight["granularity"] == granularity
    assert main(["explain", str(found.model), "bad"]) == 0
    assert text in " ".join(capsys.readouterr().err.split())
    summary: Any = found.report["summary"]
    assert summary["formats"] == {recipe: 3} and summary["integer_anchors"] == 0
    assert summary["parameters_by_bits"] == {str(weight["bits"]): 64 * 64 * 2 + 64 * 32}
    page = render_page(found.report)
    section = page.partition('id="formats"')[2].partition("</section>")[0]
    assert "none multiplies integers" in page and recipe in section and ">int8<" not in section


def test_a_layer_without_quantizers_of_its_own_is_measured_too(tmp_path: Path) -> None:
    found = made(tmp_path, "nf4")
    advice: Any = found.report["advice"]
    assert len(advice) == 3 and all(a["inputs_db"] is None for a in advice)
    # Four bits leave some 20 dB, shared by three layers: each alone costs between 0 and 10 log10(3).
    assert max(a["gain_db"] for a in advice) > 1 and advice[0]["blame"] == "weights"


def test_budgets_and_their_prices_are_told(tmp_path: Path) -> None:
    found = made(tmp_path, "mixed", budget={"size": 24000.0})
    allocation: Any = found.report["allocation"]
    assert allocation["proven"] and allocation["budgets"][0]["used"] <= 24000
    planned = {n: d["format"] for n, d in ((r["node"], r) for r in found.report["layers"])}  # type: ignore[attr-defined]
    assert all(planned[name] == fmt for name, fmt in allocation["formats"].items())
    page = render_page(found.report)
    assert "the solver proved it" in page and "24000 bytes" in page


def test_the_migration_is_told_rewrite_by_rewrite(tmp_path: Path) -> None:
    found = made(tmp_path, "int8")
    migrations: Any = found.report["migrations"]
    assert sum(m["changes"] for m in migrations) > 0, "the outlier is there to be migrated"
    assert found.report["recipe"]["name"] == "int8"  # type: ignore[index]
    assert all(m["rewrite"] in render_page(found.report) for m in migrations)


@pytest.mark.parametrize(
    ("found", "fmt", "blame"),
    [
        (WhatIf("n", 6.0, 5.0, 0.5), "int8", "inputs"),
        (WhatIf("n", 6.0, 0.5, 5.0), "int8", "weights"),
        (WhatIf("n", 6.0, 3.0, 2.0), "int8", "both"),
        (WhatIf("n", 6.0, -4.0, -5.0), "int8", "both"),
        (WhatIf("n", 6.0, 0.1, 0.1, 5.0), "int8", "output"),
        (WhatIf("n", 20.0, -4.0, -4.0, 0.2), "int8", "both"),
        (WhatIf("n", 0.01, 0.0, 0.0), "int8", "nothing"),
        (WhatIf("n", -3.0, 2.0, 0.0), "int8", "nothing"),
        (WhatIf("n", 2.0, None, None), "w4", "weights"),
        (WhatIf("n", 2.0, None, None), "int8-row", "both"),
    ],
)
def test_blame(found: WhatIf, fmt: str, blame: str) -> None:
    assert blamed(found, fmt) == blame
