"""From an ONNX decoder to a GGUF file and back: the same logits, types within the budget, nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from llama_models import Sizes, llama_model

import bitwright
from bitwright.compiler.cli.app import main
from bitwright.compiler.errors import InfeasibleBudgetError, ModelError, UsageError
from bitwright.compiler.gguf.reader import GgufFile
from bitwright.compiler.to_gguf.export import Request, export_gguf, open_decoder
from bitwright.compiler.to_gguf.importance import mean_squares
from bitwright.compiler.to_gguf.proof import graph_logits
from bitwright.compiler.to_gguf.restore import restore, with_weights_of

SIZES = Sizes(layers=2, width=256, heads=4, key_heads=2, feed_forward=512, vocabulary=64, positions=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(llama_model(SIZES), path)
    vocabulary = {chr(0x100 + k): k for k in range(60)}
    tokenizer = {
        "added_tokens": [{"id": 60, "content": "<s>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    path.with_name("tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def samples(count: int = 6, length: int = 24) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(0).integers(0, SIZES.vocabulary, (count, length))}


def logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["scores"], {"ids": tokens})[0]
    return found


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(),
        Sizes(cache=True, tied=False),
        Sizes(computed_angles=True),
        Sizes(fused_attention=True),
        Sizes(guarded_attention=True),
    ],
    ids=["plain", "cache", "computed angles", "fused attention", "guarded attention"],
)
def test_the_parts_compute_what_the_graph_does(tmp_path: Path, sizes: Sizes) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(llama_model(sizes), path)
    # Float32 sums in another order.
    assert open_decoder(path).proof < 1e-5


def test_a_graph_that_does_more_is_not_proven(tmp_path: Path) -> None:
    proto = llama_model(Sizes())
    # A mask that lets every position see all others: the structure is that of a llama decoder.
    next(n for n in proto.graph.node if n.op_type == "LessOrEqual").op_type = "Less"
    onnx.save(proto, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="gives other logits"):
        open_decoder(tmp_path / "net.onnx")


def test_a_float_file_comes_back_as_the_same_model(model: Path, tmp_path: Path) -> None:
    written = export_gguf(Request(model, tmp_path / "a.gguf", "F32"))
    assert written.bits == 32 and written.bytes == (tmp_path / "a.gguf").stat().st_size
    restore(model, tmp_path / "a.gguf", tmp_path / "back.onnx")
    tokens = samples(1)["ids"]
    assert np.allclose(logits(tmp_path / "back.onnx", tokens), logits(model, tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("F16", 1.2e-3), ("Q8_0", 0.03), ("Q6_K", 0.1), ("Q5_K_S", 0.2), ("Q4_K_M", 0.33), ("Q2_K", 0.8)],
)
def test_logits_stay_within_the_types_noise(model: Path, tmp_path: Path, kind: str, bound: float) -> None:
    """Bounds are one and a half times what was measured; a wrong order of the heads' rows loses 0.53 in float32."""
    export_gguf(Request(model, tmp_path / "a.gguf", kind, data=samples()))
    restore(model, tmp_path / "a.gguf", tmp_path / "back.onnx")
    tokens = samples(2)["ids"][1:]
    found, expected = logits(tmp_path / "back.onnx", tokens), logits(model, tokens)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < bound


def test_metadata_are_complete(model: Path, tmp_path: Path) -> None:
    export_gguf(Request(model, tmp_path / "a.gguf", "q4_K_M", name="Net", context=48))
    with GgufFile(tmp_path / "a.gguf") as file:
        values = {key: typed.value for key, typed in file.metadata.items()}
    expected = {
        "general.architecture": "llama",
        "general.name": "Net",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "llama.vocab_size": 64,
        "llama.context_length": 48,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 60,
        "tokenizer.ggml.eos_token_id": 60,
    }
    assert {key: values[key] for key in expected} == expected
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(kinds, list) and len(tokens) == len(kinds) == 64
    assert (tokens[60], kinds[60]) == ("<s>", 3) and (tokens[61], kinds[61]) == ("[PAD61]", 5)


def test_importance_is_the_mean_square_of_what_a_matrix_reads(model: Path) -> None:
    opened = open_decoder(model, samples())
    assert opened.dataset is not None
    found = mean_squares(opened.model, opened.dataset, opened.tensors)
    assert found["blk.0.attn_q.weight"] is not None
    assert np.array_equal(found["blk.0.attn_q.weight"], found["blk.0.attn_v.weight"])
    # The first layer reads normalized embeddings, which numpy knows as well.
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(model).graph.initializer}
    rows = arrays["w_embedding"][samples()["ids"].ravel()].astype(np.float64)
    rows /= np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    assert np.allclose(found["blk.0.attn_q.weight"], ((rows * arrays["g_a0"]) ** 2).mean(axis=0), rtol=1e-4)
    assert found["token_embd.weight"].shape == (256,), "the head reads the embedding"


def test_a_budget_is_kept_and_spent_where_it_matters(model: Path, tmp_path: Path) -> None:
    tokens = samples(2, 48)["ids"]
    opened = open_decoder(model)
    expected = graph_logits(opened.model, opened.decoder, tokens[0])

    def loss(path: Path) -> float:
        found = graph_logits(with_weights_of(open_decoder(model), path), opened.decoder, tokens[0])
        return float(np.mean((found - expected) ** 2))

    uniform = export_gguf(Request(model, tmp_path / "u.gguf", "Q4_K_S", data=samples(), pure=True))
    mixed = export_gguf(Request(model, tmp_path / "m.gguf", bits=uniform.bits, data=samples()))
    assert mixed.bits <= uniform.bits + 1e-9
    assert len({t.kind for t in mixed.tensors}) > 2
    assert loss(tmp_path / "m.gguf") < loss(tmp_path / "u.gguf")


def test_budgets_need_data_and_must_be_feasible(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which matrices matter"):
        export_gguf(Request(model, tmp_path / "a.gguf", bits=4.5))
    with pytest.raises(InfeasibleBudgetError, match="the smallest types take"):
        export_gguf(Request(model, tmp_path / "a.gguf", bits=1.5, data=samples()))
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_models_are_refused(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    onnx.save(llama_model(replace(SIZES, seed=1)), other)
    export_gguf(Request(other, tmp_path / "a.gguf", "Q8_0", without_tokenizer=True))
    with pytest.raises(ModelError, match="its values are not the model's"):
        restore(model, tmp_path / "a.gguf", tmp_path / "back.onnx")
    onnx.save(llama_model(Sizes()), other)
    export_gguf(Request(other, tmp_path / "b.gguf", "Q8_0", without_tokenizer=True))
    with pytest.raises(ModelError, match="of shape"):
        restore(model, tmp_path / "b.gguf", tmp_path / "back.onnx")
    assert not (tmp_path / "back.onnx").exists()


def test_the_command_line_writes_lists_and_puts_back(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", **samples())
    target = tmp_path / "a.gguf"
    assert (
        main(["gguf", str(model), "-d", str(tmp_path / "data.npz"), "--type", "q4_K_M", "-o", str(target)])
        == 0
    )
    assert capsys.readouterr().out.strip() == str(target)
    assert main(["gguf", str(target), "-o", str(tmp_path / "other.gguf")]) == 2
    assert "--output: a GGUF file that is given is only listed" in capsys.readouterr().err
    assert main(["gguf", str(target), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["metadata"]["general.file_type"] == "15"
    assert {t["type"] for t in listed["tensors"]} == {"F32", "Q4_K", "Q5_K", "Q6_K"} - {"Q5_K"}
    assert main(["gguf", str(model), "--weights", str(target), "-o", str(tmp_path / "back.onnx")]) == 0
    assert (tmp_path / "back.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--type", "q4_K_X", "-o", "a.gguf"], 2, "Q4_K_"),
        ([], 2, "-o FILE.gguf"),
        (["-o", "a.onnx"], 2, "must end in .gguf"),
        (["-o", "a.gguf", "--budget", "latency=3ms"], 2, "bits=4.5"),
        (["-o", "a.gguf", "--tokenizer", "none.json"], 2, "--no-tokenizer"),
        (["-o", "a.gguf", "--weights", "a.gguf"], 2, "must end in .onnx"),
        (["-o", "b.onnx", "--weights", "a.gguf", "-d", "x.npz"], 2, "--data"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], code: int, word: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["gguf", str(model), *arguments]) == code
    assert word in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_function_is_the_verb(model: Path, tmp_path: Path) -> None:
    written = bitwright.gguf(model, output=tmp_path / "a.gguf", type="Q8_0", without_tokenizer=True)
    assert written.kind == "Q8_0" and written.path.is_file()
    with pytest.raises(UsageError, match="did you mean 'tokenizer'"):
        bitwright.gguf(model, output=tmp_path / "b.gguf", no_tokenizer=True)
