"""Streams of tokens as data: perplexity against its definition, calibration of decoders, the zoo's own figures."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from decoder_files import tokens, write_decoder

import bitwright
from bitwright.compiler.allocate.sensitivity import Sensitivity, measure_sensitivity
from bitwright.compiler.bundle.language_files import copy_language_files
from bitwright.compiler.cli.app import main
from bitwright.compiler.decoding.perplexity import negative_log_likelihood
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.ingest.dataset import open_dataset
from bitwright.compiler.ingest.dataset_views import Limited
from bitwright.compiler.ingest.model_reader import read_model

WINDOW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("decoder")
    write_decoder(found, "cache")
    np.savez(found / "tokens.npz", tokens=tokens(200).astype(np.uint16), bytes_per_token=np.float32(2))
    return found


def definition(path: Path, stream: np.ndarray) -> float:
    """Return the mean loss of all tokens of windows that follow each other."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    empty = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[1:]}
    losses = []
    for start in range(0, len(stream) - WINDOW, WINDOW):
        part = stream[start : start + WINDOW + 1].astype(np.int64)
        logits = session.run(["logits"], {"input_ids": part[None, :-1], **empty})[0][0]
        losses.append(negative_log_likelihood(logits, part[1:]))
    return float(np.concatenate(losses).mean())


def test_perplexity_is_what_its_definition_says(folder: Path) -> None:
    stream = np.load(folder / "tokens.npz")["tokens"]
    found = bitwright.evaluate(folder, f"perplexity:{folder / 'tokens.npz'},window={WINDOW}").perplexity
    assert found is not None
    expected = definition(folder / "model.onnx", stream)
    assert found.nll == pytest.approx(expected, rel=1e-12)
    assert found.tokens == 192 and found.bits_per_byte == pytest.approx(expected / math.log(2) / 2)


def test_a_text_is_cut_by_the_tokenizer_beside_it(folder: Path) -> None:
    pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
    text = "héllo wörld, " * 5
    (folder / "text.txt").write_text(text, encoding="utf-8")
    found = bitwright.evaluate(folder, f"perplexity:{folder / 'text.txt'},window={WINDOW}").perplexity
    assert found is not None
    # Its tokens are bytes.
    assert found.nll == pytest.approx(
        definition(folder / "model.onnx", np.frombuffer(text.encode(), np.uint8)), rel=1e-12
    )
    assert found.bytes_per_token == 1.0


def test_streams_become_windows_with_an_empty_cache(folder: Path) -> None:
    model = read_model(folder / "model.onnx").model
    data = open_dataset(f"{folder / 'tokens.npz'}:tokens,window={WINDOW}", model)
    samples = list(data)
    assert len(samples) == len(data) == 12
    stream = np.load(folder / "tokens.npz")["tokens"]
    np.testing.assert_array_equal(np.concatenate([s["input_ids"][0] for s in samples]), stream[:192])
    assert samples[0]["past_0_k"].shape == (1, 2, 0, 16)
    assert "12 windows of 16 tokens out of 200, each with an empty cache" in data.notes[0]
    assert data.warnings == ()


def test_long_streams_are_spread(tmp_path: Path, folder: Path) -> None:
    np.savez(tmp_path / "long.npz", tokens=tokens(5000))
    data = open_dataset(f"{tmp_path / 'long.npz'},window={WINDOW}", read_model(folder / "model.onnx").model)
    assert len(data) == 128 and "evenly spaced" in data.notes[0]


def test_a_decoder_with_a_cache_is_quantized_from_tokens(
    tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, output = f"{folder / 'tokens.npz'},window={WINDOW}", tmp_path / "w4.onnx"
    command = ["quantize", str(folder / "model.onnx"), "-t", "x86-avx2", "-d", data, "--recipe", "w4"]
    assert main([*command, "--eval", f"perplexity:{data}", "-o", str(output), "--json"]) == 0
    accuracy = json.loads(capfd.readouterr().out)["report"]["accuracy"]
    expected = math.exp(definition(folder / "model.onnx", np.load(folder / "tokens.npz")["tokens"]))
    assert accuracy["kind"] == "perplexity"
    # Normalization reorders float32 sums.
    assert -accuracy["float_value"] == pytest.approx(expected, rel=1e-5)
    found = bitwright.evaluate(output, f"perplexity:{data}").value
    assert accuracy["quantized_value"] == pytest.approx(found, rel=1e-5)
    assert accuracy["quantized_value"] != accuracy["float_value"]
    # The tokenizer and the stop tokens came along.
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    written = bitwright.generate(output, tokens=[1, 2, 3], max_tokens=6)
    assert written.cached and len(written.tokens) == 6


def test_another_models_tokenizer_is_left_alone(tmp_path: Path, folder: Path) -> None:
    model = read_model(folder / "model.onnx").model
    (tmp_path / "tokenizer.json").write_text("another")
    (note,) = copy_language_files(folder / "model.onnx", model, tmp_path)
    assert "tokenizer.json: another model's, left as it is" in note
    assert (tmp_path / "tokenizer.json").read_text() == "another"
    assert copy_language_files(folder / "model.onnx", model, folder) == []


def test_a_tokenizer_beside_what_is_no_decoder_stays(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    text = '<ir_version: 10, opset_import: ["": 21]> net (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "out").mkdir()
    assert copy_language_files(path, read_model(path).model, tmp_path / "out") == []
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.zoo
def test_perplexity_is_that_of_the_models_own_script() -> None:
    root = os.environ.get("BITWRIGHT_ZOO")
    if root is None:
        pytest.skip("BITWRIGHT_ZOO names no folder of real models")
    zoo = Path(root, "tinylm")
    spec = f"perplexity:{zoo / 'data.npz'}:test,windows=8"
    for name in ("model.onnx", "model_kv.onnx"):
        command = [sys.executable, str(zoo / "eval.py"), str(zoo / name), "8"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        perplexity, nll, bits = map(float, re.findall(r"(?:ppl_token|nll|bits_per_byte) ([0-9.]+)", text))
        found = bitwright.evaluate(zoo / name, spec).perplexity
        assert found is not None and found.bits_per_byte is not None
        # The script prints four digits.
        assert found.perplexity == pytest.approx(perplexity, abs=1e-4)
        assert (found.nll, found.bits_per_byte) == pytest.approx((nll, bits), abs=1e-4)


def test_sensitivities_may_be_rises_of_perplexity(tmp_path: Path, folder: Path) -> None:
    model = read_model(folder / "model.onnx").model
    spec = f"perplexity:{folder / 'tokens.npz'},window={WINDOW}"

    def build(site: str, fmt: str) -> ir.Model:
        changed = model.clone()
        weight = next(v for name, v in changed.graph.initializers.items() if site in name)
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * float(fmt), name=weight.name)
        return changed

    how = Sensitivity("eval", spec, cache=tmp_path / "cache.json")
    one = [("gate_proj", "1.0"), ("gate_proj", "3.0")]
    samples = Limited(open_dataset(f"{folder / 'tokens.npz'},window={WINDOW}", model), 1)
    same, other = (found.loss for found in measure_sensitivity(model, one, build, samples, how))
    assert same == 0
    onnx_file = tmp_path / "changed.onnx"
    save_model(build("gate_proj", "3.0"), onnx_file)
    before, after = (bitwright.evaluate(path, spec).perplexity for path in (folder, onnx_file))
    assert before is not None and after is not None
    assert other == pytest.approx(after.perplexity / before.perplexity - 1, rel=1e-9) and other != 0
