"""Streamed runs that are interrupted: what is finished is kept, taken over, and gives the same model bit for bit."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from llama_models import llama_model
from streaming_cases import TIED, arrays, options, shared_recipe, tokens_of

from bitwright.compiler.deploy import Deployment, quantize
from bitwright.compiler.errors import BitwrightError, DataError, UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.streaming import run
from bitwright.compiler.streaming.joining import PartWriter


class Interrupt:
    """Interrupts the run when a part begins."""

    def __init__(self, number: int) -> None:
        self.number = number

    def phase(self, name: str) -> None:
        """Nothing to do."""

    def step(self, done: int, total: int, what: str) -> None:
        """Stop where it was wanted."""
        if what == "parts" and done == self.number:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        """Nothing to do."""


def asked_in(folder: Path, **changes: object) -> Options:
    folder.mkdir(exist_ok=True)
    (folder / "shared.yaml").write_text(shared_recipe("nearest", "integer"))
    recipe = str(folder / "shared.yaml")
    return options(folder, llama_model(TIED), TIED, recipe=recipe, **{"stream": "quantized", **changes})


def interrupted(folder: Path, number: int, **changes: object) -> Options:
    """Interrupt a run when a part begins and return its options."""
    asked = asked_in(folder, **changes)
    with pytest.raises(KeyboardInterrupt):
        quantize(asked, Interrupt(number))
    return asked


@pytest.fixture(scope="module")
def at_a_stretch(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return quantize(asked_in(tmp_path_factory.mktemp("stretch") / "q"))


def test_resumed_run_writes_the_same(
    at_a_stretch: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted twice; finished parts are not computed again."""
    asked = interrupted(tmp_path / "q", 1)
    kept = sorted(p.name for p in (tmp_path / "q" / "q.onnx.parts").iterdir())
    assert "0000.json" in kept
    assert "q.onnx" not in {p.name for p in (tmp_path / "q").iterdir()}
    planned: list[int] = []
    plan_part = run.plan_part

    def counted(state: object) -> None:
        planned.append(1)
        plan_part(state)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "plan_part", counted)
    again = replace(asked, resume=True)
    with pytest.raises(KeyboardInterrupt):
        quantize(again, Interrupt(3))
    assert len(planned) == 2
    made = quantize(again)
    assert len(planned) == 3
    expected, found = arrays(at_a_stretch.model), arrays(made.model)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    graphs = [onnx.load(d.model, load_external_data=False).graph for d in (at_a_stretch, made)]
    assert graphs[0].node == graphs[1].node
    for key in ("layers", "summary", "sizes", "noise", "streaming", "float"):
        assert made.report[key] == at_a_stretch.report[key], key
    assert yaml.safe_load(made.plan.read_text()) == yaml.safe_load(at_a_stretch.plan.read_text())
    notes = [note for phase in made.report["phases"] for note in phase["notes"]]
    assert any("3 finished parts were taken over" in note for note in notes)
    assert not (tmp_path / "q" / "q.onnx.parts").exists()


def test_without_resume_everything_begins_anew(at_a_stretch: Deployment, tmp_path: Path) -> None:
    asked = interrupted(tmp_path / "q", 2)
    made = quantize(asked)
    assert sorted(arrays(made.model)) == sorted(arrays(at_a_stretch.model))
    assert not any("taken over" in note for phase in made.report["phases"] for note in phase["notes"])
    assert not (tmp_path / "q" / "q.onnx.parts").exists()


def test_parts_of_another_run_are_refused_by_what_differs(tmp_path: Path) -> None:
    asked = interrupted(tmp_path / "q", 1)
    stream = np.random.default_rng(4).integers(0, TIED.vocabulary, 128)
    np.savez(tmp_path / "other.npz", calibration=stream.astype(np.int32))
    other = f"{tmp_path / 'other.npz'}:calibration,window=16,windows=6"
    for changes, what in (
        ({"data": other}, "samples"),
        ({"recipe": "w4"}, "recipe"),
        ({"stream": "float"}, "stream"),
        ({"group": 16}, "group"),
    ):
        with pytest.raises(UsageError, match=rf"made with other settings: {what}\n"):
            quantize(replace(asked, resume=True, **changes))  # type: ignore[arg-type]
    onnx.save(llama_model(replace(TIED, seed=5)), asked.model)
    with pytest.raises(UsageError, match=r"made with other settings: model\n"):
        quantize(replace(asked, resume=True))
    assert (tmp_path / "q" / "q.onnx.parts").is_dir()


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished parts to go on from"):
        quantize(asked_in(tmp_path / "q", resume=True))
    with pytest.raises(UsageError, match="quantized at once has no finished parts"):
        quantize(asked_in(tmp_path / "q", resume=True, stream="off"))


@pytest.mark.parametrize("name", ["q.onnx.data", "0001.json", "0001.quantized", "0000.onnx", "tied.npz"])
def test_damaged_parts_are_refused(name: str, tmp_path: Path, interrupted_once: Options) -> None:
    source = interrupted_once.output
    assert source is not None
    folder = tmp_path / "q"
    asked = asked_in(folder, resume=True)
    (folder / "q.onnx.parts").mkdir()
    for path in (source.parent / "q.onnx.parts").iterdir():
        content = path.read_bytes()
        if path.name == name:
            middle = len(content) // 2
            content = content[:middle] + bytes(64) + content[middle + 64 :]
        (folder / "q.onnx.parts" / path.name).write_bytes(content)
    with pytest.raises(DataError):
        quantize(asked)


@pytest.fixture(scope="module")
def interrupted_once(tmp_path_factory: pytest.TempPathFactory) -> Options:
    return interrupted(tmp_path_factory.mktemp("once") / "q", 2)


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = PartWriter.add

    def full(writer: PartWriter, model: object) -> dict[str, str]:
        if writer.end > 40_000:  # behind the table
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(writer, model)  # type: ignore[arg-type]

    asked = asked_in(tmp_path / "q")
    monkeypatch.setattr(PartWriter, "add", full)
    with pytest.raises(UsageError, match="No space left on device; finished parts are in") as caught:
        quantize(asked)
    assert "--resume" in (caught.value.fix or "")
    monkeypatch.undo()
    quantize(replace(asked, resume=True))
    assert not (tmp_path / "q" / "q.onnx.parts").exists()


def test_a_run_that_fails_for_good_leaves_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: object, path: Path, notes: list[str]) -> None:
        what = "the joined model differs"
        raise BitwrightError(what)

    monkeypatch.setattr(run._Run, "check", refused)
    with pytest.raises(BitwrightError):
        quantize(asked_in(tmp_path / "q"))
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == ["model.onnx", "shared.yaml", "tokens.npz"]


def test_records_are_plain_json(interrupted_once: Options) -> None:
    assert interrupted_once.output is not None
    folder = interrupted_once.output.parent / "q.onnx.parts"
    record = json.loads((folder / "0001.json").read_text())
    assert set(record["passed"]) == {"float", "quantized"}
    assert not (folder / "0000.quantized").exists()  # only what the last part passes on is needed
    assert tokens_of(TIED, folder.parent) == interrupted_once.data
