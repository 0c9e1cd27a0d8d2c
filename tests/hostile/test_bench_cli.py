"""Wrong options of ``bench``: refused before anything is measured, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from bitwright.compiler.bench import comparison
from bitwright.compiler.cli.app import main

MODEL = '<ir_version: 8, opset_import: ["": 17]> g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }'
CASES = {
    "the reference twice": ("m.onnx n.onnx --against n.onnx", 2, "named twice"),
    "no reference": ("m.onnx", 2, "second model"),
    "own form of a model": ("m.onnx --against int8", 2, "nothing to compare it with"),
    "float form of a model": ("m.onnx --against fp32", 2, "nothing to compare it with"),
    "no such reference": ("m.onnx --against none.onnx", 2, "none.onnx"),
    "roofline of a model": ("m.onnx n.onnx --roofline r.svg", 2, "only a bundle"),
    "figures into a folder": ("m.onnx n.onnx -o full.json", 2, ".json"),
    "figures without an ending": ("m.onnx n.onnx -o figures", 2, "figures.json"),
    "figures below a file": ("m.onnx n.onnx -o m.onnx/f.json", 2, "is not a folder"),
    "picture of another kind": ("full --roofline r.png", 2, "r.svg"),
    "a folder that is no bundle": ("full", 2, "not a bitwright output folder"),
    "no threads": ("m.onnx n.onnx --threads 0", 2, "--threads"),
    "one round": ("m.onnx n.onnx --rounds 1", 2, "--rounds"),
    "data of other inputs": ("m.onnx n.onnx -d bad.npz", 3, "bad.npz"),
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("m", "n"):
        onnx.save(onnx.parser.parse_model(MODEL), tmp_path / f"{name}.onnx")
    for folder in ("full", "full.json"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "letter.txt").write_text("mine")
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES)
def test_refused_before_anything_is_measured(case, work, monkeypatch, capsys):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(comparison, "take_turns", never)
    before = listing(work)
    arguments, code, words = CASES[case]
    assert main(["bench", *arguments.split()]) == code
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == "" and listing(work) == before


def test_figures_are_written_and_printed(work, capsys):
    assert (
        main(["bench", "m.onnx", "n.onnx", "--rounds", "2", "--sessions", "1", "-o", "f/figures.json"]) == 0
    )
    captured = capsys.readouterr()
    number, path = captured.out.split()
    record = json.loads(Path(path).read_text())
    assert float(number) == pytest.approx(record["ratio"], abs=1e-4)
    assert record["interval"][0] <= record["ratio"] <= record["interval"][1]
    assert record["threads"] == 1 and record["rounds"] == 2 and record["data"] == "random inputs"
    assert "own process" in " ".join(captured.err.split())
