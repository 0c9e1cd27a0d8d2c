"""``bench`` of bundles: the artifact in this process gives what the runner gives; its kernels under the roofline."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from recurrent_model import samples, save_recurrent

from bitwright.compiler.bench import roofline
from bitwright.compiler.bench.artifact_call import artifact_call
from bitwright.compiler.bench.ceilings import Ceilings, InstructionCeiling, MemoryCeiling
from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.cli.app import main
from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.lower.loaded import load_library
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="executes x86-64 code")

TARGET = "x86-avx2"
TEXT = """
<ir_version: 10, opset_import: ["": 17]>
small (float[1,3,8,8] x) => (float[1,5] y) {
  [first] a = Conv<pads=[1,1,1,1]>(x, w1)
  [relu] b = Relu(a)
  [second] c = Conv<pads=[1,1,1,1]>(b, w2)
  [pool] d = GlobalAveragePool(c)
  [flat] e = Flatten(d)
  [head] y = Gemm(e, w3)
}
"""
CEILINGS = Ceilings(
    machine="this machine",
    threads=1,
    date="2026-01-01",
    load=0.0,
    versions={},
    instructions={"avx2_pmaddwd": InstructionCeiling(registers=2e11, cached=1e11)},
    levels=(MemoryCeiling(name="l2", bytes=1 << 40, bytes_per_s=1e11),),
)
FAST = ["--rounds", "2", "--sessions", "1"]


def compiled(model: Path, data: object, out: Path) -> Bundle:
    profile = load_profile(TARGET)
    reason = backend_for(profile.family).why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    made = compile_model(Options(model=model, data=data, output=out, target=TARGET))
    assert made is not None
    return made


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder, random = tmp_path_factory.mktemp("bench"), np.random.default_rng(0)
    model = onnx.parser.parse_model(TEXT)
    for name, shape in {"w1": (8, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 5)}.items():
        array = random.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, folder / "m.onnx")
    given = [{"x": random.normal(size=(1, 3, 8, 8)).astype(np.float32)} for _ in range(8)]
    return compiled(folder / "m.onnx", given, folder / "out")


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("hybrid")
    made = compiled(save_recurrent(folder / "model.onnx"), samples(), folder / "out")
    assert made.segments is not None
    return made


def drawn(group: ElementTree.Element) -> int:
    """Return the shapes of an SVG group; equal ones are defined once and used."""
    space = "{http://www.w3.org/2000/svg}"
    defined = sum(len(list(defs.iter(f"{space}path"))) for defs in group.iter(f"{space}defs"))
    return sum(len(list(group.iter(f"{space}{tag}"))) for tag in ("use", "path")) - defined


def test_the_library_in_this_process_gives_what_the_runner_gives(bundle: Bundle) -> None:
    golden = next(bundle.golden())
    lib = bundle.path / "lib"
    (found,) = load_library(lib / "model.so", lib).run([golden.inputs["x"]])
    np.testing.assert_array_equal(found, bundle.run(golden.inputs)["y"])


def test_an_artifact_in_segments_gives_what_the_bundle_gives(hybrid: Bundle) -> None:
    golden = next(hybrid.golden())
    found = artifact_call(hybrid.path, golden.inputs, SessionConfig())()
    for name, expected in hybrid.run(golden.inputs).items():
        np.testing.assert_array_equal(found[name], expected)


def test_the_float_model_is_found_beside_the_bundle(bundle: Bundle, tmp_path: Path, capsys) -> None:
    assert main(["bench", str(bundle.path), "--against", "fp32", *FAST, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["first"].endswith("(artifact)") and "m.onnx" in record["second"]
    assert record["data"] == "golden inputs" and record["threads"] == 1
    other = tmp_path / "elsewhere" / "deeper" / "out"
    shutil.copytree(bundle.path, other)
    (other.parent / "m.onnx").write_bytes((bundle.path / "model.onnx").read_bytes())
    assert main(["bench", str(other), "--against", "fp32"]) == 2
    assert "--against PATH/m.onnx" in capsys.readouterr().err


def test_the_roofline_has_every_integer_kernel(bundle: Bundle, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(roofline, "machine_ceilings", lambda threads: CEILINGS)
    picture = tmp_path / "r.svg"
    assert main(["bench", str(bundle.path), *FAST, "--roofline", str(picture), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["roofline"]
    table = json.loads((bundle.path / "lib/kernels.json").read_text())["calls"]
    assert [k["operation"] for k in record["kernels"]] == [c["operation"] for c in table]
    by_name = {k["name"]: k for k in record["kernels"]}
    assert by_name["second"]["operations"] == 2 * 8 * 8 * 16 * 8 * 9
    assert by_name["head"]["bytes"] >= 16 * 5 + 16 and by_name["head"]["seconds"] > 0
    assert record["picture"] == str(picture)
    groups = [g for g in ElementTree.parse(picture).iter() if str(g.get("id")).startswith("kernels-")]
    assert sum(map(drawn, groups)) == len(table)


def test_segments_have_no_roofline(hybrid: Bundle, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "r.svg"
    assert main(["bench", str(hybrid.path), *FAST, "--roofline", str(picture)]) == 2
    assert "in segments" in capsys.readouterr().err and not picture.exists()


def test_a_library_that_is_none_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "model.so").write_bytes(b"no library")
    with pytest.raises(ToolchainError, match="cannot be loaded"):
        load_library(tmp_path / "model.so", bundle.path / "lib")
