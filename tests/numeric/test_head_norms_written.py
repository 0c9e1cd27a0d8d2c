"""What is written of decoders with norms of query and key heads and with windows: GGUF files and deployments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import CheckpointSizes, write_checkpoint

from bitwright.compiler.deploy import quantize
from bitwright.compiler.errors import ModelError
from bitwright.compiler.export_decoder import export_folder
from bitwright.compiler.gguf.reader import GgufFile
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.to_gguf.export import Request, export_gguf
from bitwright.compiler.to_gguf.restore import restore

QWEN3 = CheckpointSizes(architecture="Qwen3ForCausalLM", head_width=32, feed_forward=128, positions=128)
MISTRAL = CheckpointSizes(architecture="MistralForCausalLM", extra={"sliding_window": 20})


def exported(folder: Path, sizes: CheckpointSizes = QWEN3) -> Path:
    write_checkpoint(folder / "folder", sizes, dtype="float32")
    return export_folder(folder / "folder", folder / "net.onnx").path


def samples(folder: Path) -> str:
    np.savez(folder / "tokens.npz", tokens=np.random.default_rng(0).integers(0, 80, 300))
    return f"{folder / 'tokens.npz'}:tokens,window=31,windows=8"


def logits(path: Path, count: int = 40) -> np.ndarray:
    model = ir.load(path)
    empty = {
        v.name or "": np.zeros((1, 2, 0, v.shape[3]), np.float32) for v in model.graph.inputs[1:] if v.shape
    }  # type: ignore[arg-type]
    tokens = np.arange(count)[None] * 31 % 80
    return run(open_session(model), {"input_ids": tokens, **empty})["logits"]


def written(path: Path, output: Path, kind: str = "F32", context: int | None = None) -> Path:
    return export_gguf(Request(path, output, kind, without_tokenizer=True, context=context)).path


@pytest.mark.parametrize(("kind", "bound"), [("F32", 1e-5), ("Q8_0", 0.03)])
def test_gguf_of_qwen3_is_read_back(kind: str, bound: float, tmp_path: Path) -> None:
    model = exported(tmp_path)
    file = written(model, tmp_path / "a.gguf", kind)
    with GgufFile(file) as found:
        values = {key: typed.value for key, typed in found.metadata.items()}
        shapes = {
            name: found.tensors[f"blk.1.attn_{name}.weight"].shape for name in ("q_norm", "k_norm", "q", "k")
        }
    assert (values["general.architecture"], values["qwen3.context_length"]) == ("qwen3", 128)
    assert values["qwen3.attention.key_length"] == 32
    assert shapes == {"q_norm": (32,), "k_norm": (32,), "q": (128, 64), "k": (64, 64)}
    assert not any(key.startswith("llama.") for key in values)
    restore(model, file, tmp_path / "back.onnx")
    expected, back = logits(model), logits(tmp_path / "back.onnx")
    assert np.sqrt(np.mean((back - expected) ** 2) / np.mean(expected**2)) < bound


def test_qwen3_keeps_the_order_of_rows(tmp_path: Path) -> None:
    """llama.cpp turns halves of heads for this architecture, as checkpoints do; llama's rows are reordered."""
    model = exported(tmp_path)
    weight = ir.load(model).graph.initializers["model.layers.0.self_attn.q_proj.weight"].const_value
    assert weight is not None
    with GgufFile(written(model, tmp_path / "a.gguf")) as file:
        assert np.array_equal(file.array("blk.0.attn_q.weight"), weight.numpy().T)


def test_gguf_says_what_it_has_no_words_for(tmp_path: Path) -> None:
    window = exported(tmp_path / "window", MISTRAL)
    with pytest.raises(ModelError, match="attention sees 20 positions") as caught:
        written(window, tmp_path / "a.gguf")
    assert caught.value.fix is not None and caught.value.fix.startswith("--context 20")
    assert written(window, tmp_path / "a.gguf", context=20).is_file()
    biased = exported(tmp_path / "biased", replace(QWEN3, extra={"attention_bias": True}))
    with pytest.raises(ModelError, match=r"a bias \('blk\.0\.attn_q\.bias'\)"):
        written(biased, tmp_path / "b.gguf")
    stretched = exported(tmp_path / "stretched", replace(QWEN3, rope={"type": "linear", "factor": 4.0}))
    with pytest.raises(ModelError, match="stretched positions"):
        written(stretched, tmp_path / "c.gguf")
    assert not (tmp_path / "b.gguf").exists() and not (tmp_path / "c.gguf").exists()


@pytest.mark.parametrize("recipe", ["w4", "w4a8-rotated", "int8-row"])
def test_deployments(recipe: str, tmp_path: Path) -> None:
    """Random weights of 64 columns: 4 bits move the logits by a fifth of their size, 8 bits by a hundredth."""
    model = exported(tmp_path)
    made = quantize(
        Options(
            model=model,
            target="host",
            data=samples(tmp_path),
            output=tmp_path / "q.onnx",
            recipe=recipe,
            gate=False,
        )
    )
    found = ir.load(made.model)
    operators = [n.op_type for n in found.graph]
    assert operators.count("GroupQueryAttention") == 2 and "Softmax" not in operators
    expected, after = logits(model), logits(made.model)
    bound = 0.05 if recipe == "int8-row" else 0.35
    assert np.sqrt(np.mean((after - expected) ** 2) / np.mean(expected**2)) < bound


@pytest.mark.parametrize("stream", ["off", "float"])
def test_streaming_takes_norms_of_heads_along(stream: str, tmp_path: Path) -> None:
    model = exported(tmp_path)
    options = Options(
        model=model,
        target="host",
        data=samples(tmp_path),
        output=tmp_path / "q.onnx",
        recipe="w4",
        gate=False,
        stream=stream,
    )
    made = quantize(options)
    names = [n.op_type for n in ir.load(made.model).graph]
    assert names.count("GroupQueryAttention") == 2
    found, expected = logits(made.model), logits(model)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.35
