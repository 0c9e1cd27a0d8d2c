"""``targets probe``: kernels attributed to operators, a small real measurement, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitwright.compiler.cli.app import main
from bitwright.compiler.errors import ProfileError
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.ort.attribution import Owner, attribute
from bitwright.compiler.ort.profiling import original_name, profile_call
from bitwright.compiler.ort.session import config_for
from bitwright.compiler.plan.latency import chains, crossings, predict
from bitwright.compiler.probing.blocks import blocks
from bitwright.compiler.probing.placements import feeds_of, place, prepare, uniform, wishes
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Profile
from bitwright.targets.this_machine import why_another
from bitwright.targets.x86_cpu.detect import describe_host


def _host_or_reason() -> str:
    try:
        describe_host()
    except ProfileError as error:
        return error.what
    return ""


NO_HOST = _host_or_reason()
needs_host = pytest.mark.skipif(bool(NO_HOST), reason=f"no profile of this machine: {NO_HOST}")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the smallest convolutional block."""
    block = next(b for b in blocks() if b.label == "convolutions 16x8x8 to 16x16x16")
    path = tmp_path_factory.mktemp("probe") / "block.onnx"
    save_model(block.model(), path)
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("relu1_nchwc", "relu1"),
        ("conv0_token_12", "conv0"),
        ("Mul_9/QuickGeluFusion/", "Mul_9"),
        ("MatMul_0/MatMulAddFusion", "MatMul_0"),
        ("conv_nchwc_token_3", "conv"),
        ("plain", "plain"),
        ("_token_1", "_token_1"),
    ],
)
def test_names_lead_back_to_what_was_replaced(name: str, expected: str) -> None:
    assert original_name(name) == expected


@pytest.fixture(scope="module")
def profile() -> Profile:
    return load_profile("x86-avx512-vnni")  # any: attribution measures nothing about the target


def test_every_second_of_a_call_has_an_owner(small: Path, profile: Profile) -> None:
    c = prepare(profile, small, data=None, dims={}, threads=1)
    table, feeds = profile.runtimes.onnxruntime, feeds_of(c)
    chosen = [w for w in wishes(c) if w.label == "float" or w.label.startswith("int8")]
    assert len(chosen) >= 4
    for wish in chosen[:4]:
        placed = place(c, wish, feeds)
        call = profile_call(placed.model, config_for(table), feeds, seconds=0.02)
        found = attribute(call, placed.model, placed.selection, table, c.shapes)
        total = sum(found.seconds.values()) + found.rest_s + call.call_s
        assert total == pytest.approx(call.seconds, rel=1e-6)
        assert sum(k.seconds for k in call.kernels) + call.call_s == pytest.approx(call.seconds, rel=1e-6)
        assert set(found.seconds) == {
            *(Owner("operator", ch.unit.name) for ch in chains(placed.selection, table)),
            *(Owner(x.operator, x.value.name or "") for x in crossings(placed.selection)),
        }
        heavy = [ch.unit.name for ch in chains(placed.selection, table) if ch.unit.head.op_type == "Conv"]
        # A convolution is never fused away: it must have been found under whatever name it runs.
        assert all(found.seconds[Owner("operator", name)] > 0 for name in heavy)
        assert found.rest_s < 0.2 * call.seconds


def test_a_format_that_does_not_cover_the_model_is_not_measured(small: Path, profile: Profile) -> None:
    c = prepare(profile, small, data=None, dims={}, threads=1)
    labels = [w.label for w in wishes(c)]
    assert labels[0] == "float" and len(labels) == len(set(labels))
    assert next(iter(wishes(c))).formats == uniform("float")


@needs_host
def test_probe_of_a_model_writes_a_profile_that_loads(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine.yaml"
    code = main(
        ["targets", "probe", "host", "--model", str(small), "-o", str(output), "--seconds", "0.5", "--json"]
    )
    record = json.loads(capsys.readouterr().out)
    assert code == 0 and record["calls"] > 20
    assert set(record["predicted"]) == set(record["measured"]) >= {"float", "int8"}
    loaded = load_profile(output)
    assert loaded.measured is not None and loaded.measured.onnxruntime is not None
    times = loaded.measured.onnxruntime
    assert {"float", "int8"} <= set(times.times["Conv"]) and times.versions["onnxruntime"]
    assert loaded.provenance["measured"].confidence == "measured"
    c = prepare(loaded, small, data=None, dims={}, threads=1)
    placed = place(c, next(iter(wishes(c))), feeds_of(c))
    found = predict(placed.selection, loaded, "onnxruntime", c.shapes)
    assert found.origin == "measured" and found.seconds > 0
    # A second one extends the first, and nothing is overwritten.
    assert main(["targets", "probe", "host", "--model", str(small), "-o", str(output)]) == 2
    assert "the file exists already" in capsys.readouterr().err


REFUSED = {
    "another family": (["arm-cortex-a76"], "'arm-cortex-a76' cannot be measured here"),
    "unknown target": (["nowhere"], "unknown target 'nowhere'"),
    "unknown runtime": (["host", "--runtime", "ort"], "unknown runtime 'ort'"),
    "data without a model": (["host", "-d", "x.npz"], "samples and sizes belong to a model"),
    "sizes without a model": (["host", "--dim", "N=1"], "samples and sizes belong to a model"),
    "no yaml": (["host", "-o", "mine.txt"], "a profile's file name ends in .yaml"),
    "no time": (["host", "--seconds", "0"], "--seconds"),
}


@pytest.mark.parametrize("case", list(REFUSED))
@needs_host
def test_refusals(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = REFUSED[case]
    assert main(["targets", "probe", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@needs_host
def test_a_poorer_processor_of_the_same_family_is_another_machine() -> None:
    host = load_profile("host")
    assert why_another(host) is None
    poorer = host.model_copy(update={"compute": host.compute[-1:]})
    reason = why_another(poorer)
    assert reason is not None and "which ONNX Runtime would use" in reason
    clockless = host.model_copy(update={"clock_hz": 1e9})
    assert why_another(clockless) is None  # numbers may differ; that is what is measured


def test_a_profile_in_another_folder_cannot_be_extended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    board = tmp_path / "a" / "board.yaml"
    board.write_text("schema: 1\nname: board\nextends: x86-amx\ndescription: d\n")
    assert main(["targets", "probe", str(board), "-o", str(tmp_path / "out.yaml")]) == 2
    assert "lies in another folder" in capsys.readouterr().err
