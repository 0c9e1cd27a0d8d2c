"""Decoders, prompts, tokenizers and streams of tokens that are wrong: each refused with its place, rule and fix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from bitwright.compiler.cli.app import main

USAGE, MODEL_OR_DATA, TOOLS = 2, 3, 7
HEADER = '<ir_version: 10, opset_import: ["": 21]>'
# A model of four tokens: the next one is always one more.
COUNTER = """
    table = Constant<value = float[4, 4] {0,9,0,0, 0,0,9,0, 0,0,0,9, 9,0,0,0}>()
    logits = Gather<axis=0>(table, ids)
"""
NOT_FINITE = """
    zero = Constant<value = float {0}>()
    table = Constant<value = float[4, 4] {1,1,1,1, 1,1,1,1, 0,0,0,0, 1,1,1,1}>()
    rows = Gather<axis=0>(table, ids)
    logits = Div(zero, rows)
"""
TWO_LETTERS = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
IMAGE = "net (float[N, 3] image) => (float[N, 3] out) { out = Relu(image) }"
FIXED = f"net (int64[1, 8] ids) => (float[1, 8, 4] logits) {{ {COUNTER} }}"


def decoder(path: Path, body: str = COUNTER) -> Path:
    """Write a decoder of four tokens."""
    return written(path, f"net (int64[N, T] ids) => (float[N, T, 4] logits) {{ {body} }}")


def written(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(f"{HEADER} {text}"), path)
    return path


def refused(capfd: pytest.CaptureFixture[str], code: int, *command: object) -> str:
    """Run the command line and return the message of its refusal."""
    capfd.readouterr()
    assert main([*map(str, command), "--json"]) == code
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["exit_code"] == code and error["fix"], error
    return f"{error['where']}: {error['what']}; {error['fix']}"


def test_the_model_of_these_tests_works(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(decoder(tmp_path / "m.onnx")), "--tokens", "2", "-n", "3"]) == 0
    assert capfd.readouterr().out == "3 0 1 \n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--prompt: a prompt is needed"),
        (["--tokens", "1", "--prompt", "x"], "as text and as tokens"),
        (["--tokens", ""], "'' is no token number"),
        (["--tokens", "1,-2"], "'-2' is no token number"),
        (["--tokens", "1,x"], "'x' is no token number"),
        (["--tokens", "1", "-n", "0"], "--max-tokens"),
        (["--tokens", "1", "--top-k", "3"], "--top-k: at temperature 0"),
        (["--tokens", "1", "--temperature", "-2"], "--temperature"),
        (["--prompt", "x"], "there is no tokenizer.json beside the model"),
        (["--prompt", "x", "--tokenizer", "none.json"], "none.json: there is no such file"),
        (["--tokens", "1", "--chat"], "--chat: token numbers are no message"),
        (["--prompt", "x", "--system", "y"], "--system: only a chat"),
        (["--tokens", "1", "--compare", "none.onnx"], "none.onnx: there is no such file"),
    ],
)
def test_wrong_options(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refused(capfd, USAGE, "generate", decoder(tmp_path / "m.onnx"), *options)


def test_a_token_that_the_model_lacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = refused(capfd, MODEL_OR_DATA, "generate", decoder(tmp_path / "m.onnx"), "--tokens", "1,4")
    assert "token 4 is none of the model's 4 tokens" in message


def test_logits_that_are_not_finite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = decoder(tmp_path / "m.onnx", NOT_FINITE)
    assert main(["generate", str(path), "--tokens", "1", "-n", "1"]) == 0
    assert "not finite" in refused(capfd, MODEL_OR_DATA, "generate", path, "--tokens", "2")
    np.savez(tmp_path / "t.npz", tokens=np.array([0, 1, 2, 3] * 4))
    command = ("evaluate", path, "--eval", f"perplexity:{tmp_path / 't.npz'},window=4")
    assert "not finite" in refused(capfd, MODEL_OR_DATA, *command)


@pytest.mark.parametrize(
    ("text", "words"), [(IMAGE, "not a decoder"), (FIXED, "takes 8 tokens in every call")]
)
def test_graphs_that_cannot_generate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str, words: str
) -> None:
    path = written(tmp_path / "m.onnx", text)
    message = refused(capfd, MODEL_OR_DATA, "generate", path, "--tokens", "1")
    assert words in message and str(path) in message


def test_folders_without_one_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "holds no .onnx file" in refused(capfd, USAGE, "generate", tmp_path, "--tokens", "1")
    decoder(tmp_path / "a.onnx")
    decoder(tmp_path / "b.onnx")
    assert "several models: a.onnx, b.onnx" in refused(capfd, USAGE, "generate", tmp_path, "--tokens", "1")


def test_models_of_other_vocabularies_are_not_compared(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = written(
        tmp_path / "o.onnx",
        "net (int64[N, T] ids) => (float[N, T, 2] logits) {"
        " table = Constant<value = float[2, 2] {0,1,1,0}>() logits = Gather<axis=0>(table, ids) }",
    )
    command = ("generate", decoder(tmp_path / "m.onnx"), "--tokens", "1", "--compare", other)
    assert "the models have 4 and 2 tokens" in refused(capfd, MODEL_OR_DATA, *command)


def test_damaged_tokenizers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
    path = decoder(tmp_path / "m.onnx")
    for data in (b"", b"{", b"\xff\xfe", b'{"model": 3}', b"[" * 100_000):
        (tmp_path / "tokenizer.json").write_bytes(data)
        message = refused(capfd, MODEL_OR_DATA, "generate", path, "--prompt", "x")
        assert "is no tokenizer" in message and "tokenizer.json" in message


def test_without_the_package_text_is_refused_and_tokens_work(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = decoder(tmp_path / "m.onnx")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("bitwright.compiler.ingest.tokenizer.find_spec", lambda name: None)
    message = refused(capfd, TOOLS, "generate", path, "--prompt", "x")
    assert "pip install 'bitwright[lm]'" in message
    assert main(["generate", str(path), "--tokens", "2", "-n", "2"]) == 0
    caught = capfd.readouterr()
    assert caught.out == "3 0 \n" and "no text is shown" in caught.err


@pytest.mark.parametrize(
    "entry", ['{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}', '{"eos_token_id": -1}', "[]", "{"]
)
def test_damaged_stop_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str], entry: str) -> None:
    path = decoder(tmp_path / "m.onnx")
    (tmp_path / "generation_config.json").write_text(entry)
    assert "generation_config.json" in refused(capfd, MODEL_OR_DATA, "generate", path, "--tokens", "1")


def test_damaged_session_options(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = decoder(tmp_path / "m.onnx")
    (tmp_path / "m.session.json").write_text('{"providers": 3}')
    assert "m.session.json" in refused(capfd, USAGE, "generate", path, "--tokens", "1")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages", "the chat template fails"),
        ("{{ raise_exception('no system, please') }}", "no system, please"),
        ("{{ ().__class__.__base__.__subclasses__() }}", "the chat template fails"),
        ("{% include '/etc/passwd' %}", "the chat template fails"),
        ("{{ 1 // 0 }}", "the chat template fails"),
        ("{% for k in range(10 ** 9) %}x{% endfor %}", "the chat template fails"),
        (None, "without a chat template"),
    ],
)
def test_chat_templates(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], template: str | None, words: str
) -> None:
    pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
    pytest.importorskip("jinja2", reason="chat templates need the package jinja2")
    path = decoder(tmp_path / "m.onnx")
    (tmp_path / "tokenizer.json").write_text(json.dumps(TWO_LETTERS))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    code = USAGE if template is None else MODEL_OR_DATA
    assert words in refused(capfd, code, "generate", path, "--prompt", "ab", "--chat")


def streams(tmp_path: Path) -> list[tuple[str, int, str]]:
    """Return metrics that are refused: name, exit code, words of the message."""
    np.savez(tmp_path / "floats.npz", tokens=np.ones(9, np.float32))
    np.savez(tmp_path / "high.npz", tokens=np.array([0, 1, 4, 2, 3, 1]))
    np.savez(tmp_path / "low.npz", tokens=np.array([0, 1, -1, 2, 3, 1]))
    np.savez(tmp_path / "bytes.npz", tokens=np.array([0, 1] * 9), bytes_per_token=np.float32(-1))
    np.savez(tmp_path / "good.npz", tokens=np.array([0, 1, 2, 3] * 4))
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "alone.txt").write_text("text")
    return [
        ("floats.npz,window=2", MODEL_OR_DATA, "holds no stream of tokens"),
        ("high.npz,window=2", MODEL_OR_DATA, "token 4 is none of the model's 4 tokens"),
        ("low.npz,window=2", MODEL_OR_DATA, "token -1 is none"),
        ("bytes.npz,window=2", MODEL_OR_DATA, "bytes_per_token"),
        ("zip.npz", MODEL_OR_DATA, "is not a readable .npz file"),
        ("good.npz", MODEL_OR_DATA, "do not fill a window of 256"),
        ("good.npz:token,window=2", MODEL_OR_DATA, "did you mean 'tokens'"),
        ("good.npz,tokenizer=t.json", USAGE, "nothing for a tokenizer to do"),
        ("alone.txt", USAGE, "no tokenizer.json beside it"),
    ]


def test_streams_of_tokens(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = decoder(tmp_path / "m.onnx")
    for name, code, words in streams(tmp_path):
        assert words in refused(capfd, code, "evaluate", path, "--eval", f"perplexity:{name}")


def test_calibration_streams(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = decoder(tmp_path / "m.onnx")
    command = ("quantize", path, "-t", "x86-avx2", "-o", tmp_path / "q.onnx", "-d")
    for name, code, words in streams(tmp_path):
        if not name.startswith("bytes"):
            assert words in refused(capfd, code, *command, name)
    image = written(tmp_path / "image.onnx", IMAGE)
    message = refused(capfd, MODEL_OR_DATA, "quantize", image, "-t", "x86-avx2", "-d", "good.npz:tokens")
    assert "not a decoder" in message


def test_text_that_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
    path = decoder(tmp_path / "m.onnx")
    (tmp_path / "tokenizer.json").write_text(json.dumps(TWO_LETTERS))
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xff\xfe\x00")
    command = ("evaluate", path, "--eval", f"perplexity:{text},window=2")
    assert "cannot be read as UTF-8 text" in refused(capfd, MODEL_OR_DATA, *command)
    text.write_bytes(b"")
    assert "0 tokens do not fill a window" in refused(capfd, MODEL_OR_DATA, *command)
    assert "the prompt has no token" in refused(capfd, USAGE, "generate", path, "--prompt", "zzz")
