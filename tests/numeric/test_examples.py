"""The examples run; what the demonstration is made of does what its texts say."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from decoder_files import write_decoder
from rich.console import Console

from bitwright.targets.loader import load_profile

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_deployment_in_onnxruntime() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "onnxruntime_deploy.py"], capture_output=True, text=True, check=True
    )
    found = re.search(r"largest difference ([\d.]+) of scores up to ([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    # Four quantized tensors of 8 bits: each adds at most half of 1/255 of its range, and most of it averages out.
    assert float(found[1]) < 0.03 * float(found[2])


def test_new_device_differs_where_it_says() -> None:
    board, base = load_profile(EXAMPLES / "new_device" / "rk3588.yaml"), load_profile("arm-cortex-a76")
    assert (board.name, board.family, board.codegen) == ("rk3588", base.family, base.codegen)
    sizes = {level.name: level.size_bytes for level in board.memory}
    assert sizes["l3"] == 3 * 2**20
    assert board.limits.ram_bytes == 8e9
    assert base.limits.ram_bytes is None


def test_lines_are_reproducible_pictures_of_text() -> None:
    import text_lines

    first, again, other = (next(text_lines.lines(1, seed=s)) for s in (5, 5, 6))
    assert first[0] == again[0] != other[0]
    x = text_lines.input_of(first[1])
    np.testing.assert_array_equal(x, text_lines.input_of(again[1]))
    assert (x.shape, x.dtype) == ((1, 3, 48, 320), np.float32)
    assert -1 <= x.min() < 0 < x.max() <= 1


def test_no_line_that_is_read_has_calibrated() -> None:
    import read_text
    import text_lines

    calibrated = {text for text, _ in text_lines.lines(text_lines.CALIBRATION_LINES, seed=1)}
    assert not calibrated & {text for text, _ in text_lines.lines(read_text.READ_LINES, seed=2)}


def test_decoding_drops_blanks_and_repeats() -> None:
    import text_lines

    scores = np.eye(4, dtype=np.float32)[None, [1, 1, 0, 1, 2, 2, 3, 0]]
    assert text_lines.decode(scores, ["", "a", "b", " "]) == "aab "


def test_the_table_shows_what_was_read() -> None:
    import read_text
    import text_lines

    alphabet = ["", "a", "b"]
    form = read_text.Form("made up", lambda x: np.eye(3)[None, [1, 2]], 1000, lambda x: 0.002)
    text = io.StringIO()
    accuracy = read_text.show([form], alphabet, Console(file=text, width=120))
    truth = [written for written, _ in text_lines.lines(read_text.READ_LINES, seed=2)]
    errors = sum(text_lines.edit_distance(written, "ab") for written in truth)
    assert accuracy == {"made up": 1 - errors / sum(map(len, truth))}
    assert "2.0 ms" in text.getvalue()
    assert f"{accuracy['made up']:.2%}" in text.getvalue()


def test_a_language_model_is_quantized_measured_and_heard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
    import language_model

    model = write_decoder(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox, " * 40)
    command = [str(model), str(tmp_path / "text.txt"), "--prompt", "the ", "--window", "32"]
    monkeypatch.setattr(sys, "argv", ["language_model.py", *command, "--output", str(tmp_path / "out")])
    language_model.main()
    rows = re.search(r"perplexity .*?([\d.]+) .*?([\d.]+)", capsys.readouterr().out)
    assert rows is not None
    # Random weights predict nothing, in any number of bits: some hundreds of 257 tokens' worth.
    assert all(100 < float(value) < 2000 for value in rows.groups())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
