"""Codes rounded with error feedback: the blocks' scales stay, the error of the layer's output falls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from llama_models import Sizes, llama_model

from bitwright.compiler.errors import UsageError
from bitwright.compiler.gguf.blocks import FORMATS, codes_of, encode
from bitwright.compiler.gguf.reader import GgufFile
from bitwright.compiler.gguf.rounding import dequantize, quantize
from bitwright.compiler.gguf.types import Q4_0, TensorType
from bitwright.compiler.ingest.dataset import dataset_from_memory
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.llama.tensors import tensors_of
from bitwright.compiler.rounding.gptq import factorize
from bitwright.compiler.to_gguf import feedback as module
from bitwright.compiler.to_gguf.export import Request, export_gguf
from bitwright.compiler.to_gguf.feedback import Feedbacks, with_feedback
from bitwright.passes.normalize import normalize

SIZES = Sizes(layers=1, width=64, heads=4, key_heads=2, feed_forward=96, vocabulary=64, positions=64)


def correlated(columns: int, rows: int = 2000) -> np.ndarray:
    """Return E[x x^T] of inputs that share a few directions, as activations do."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, 16)) @ rng.standard_normal((16, columns)) + rng.standard_normal(
        (rows, columns)
    )
    found: np.ndarray = x.T @ x / rows
    return found


@pytest.mark.parametrize("kind", list(FORMATS), ids=lambda k: k.name)
def test_the_error_of_the_output_falls_within_the_same_scales(
    kind: TensorType, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.random.default_rng(0).standard_t(5, (12, 512)).astype(np.float32) * np.float32(0.02)
    weights[:, 256:288] = 0  # a group without scale
    second = correlated(512)
    nearest = quantize(weights, kind, np.diag(second))
    feedback = factorize(second[None])
    found = with_feedback(weights, nearest, kind, feedback)

    def error(stored: np.ndarray) -> float:
        residual = (weights - dequantize(stored, kind)).astype(np.float64)
        return float(np.einsum("rk,kl,rl->", residual, second, residual))

    # With 16 directions behind 512 inputs nearly all of the error can be made good elsewhere.
    assert error(found) < 0.5 * error(nearest)
    before, after = (codes_of(FORMATS[kind], s.reshape(-1, kind.bytes)) for s in (nearest, found))
    for name in ("d", "dmin", "scale", "offset"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    monkeypatch.setattr(module, "ELEMENTS", 5 * 512)
    np.testing.assert_array_equal(with_feedback(weights, nearest, kind, feedback), found)


@pytest.mark.parametrize("kind", list(FORMATS), ids=lambda k: k.name)
def test_stored_codes_are_read_back(kind: TensorType) -> None:
    weights = np.random.default_rng(3).standard_normal((4, 512)).astype(np.float32)
    stored = quantize(weights, kind)
    codes = codes_of(FORMATS[kind], stored.reshape(-1, kind.bytes))
    np.testing.assert_array_equal(encode(FORMATS[kind], codes).reshape(stored.shape), stored)


def samples() -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(0).integers(0, SIZES.vocabulary, (8, 1, 32))}


def test_moments_come_in_the_files_order_whatever_fits_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding that the head shares is the first tensor, and its input the last of the graph."""
    model = normalize(ir.from_proto(llama_model(SIZES))).model
    tensors = tensors_of(recognise(model))
    dataset = dataset_from_memory(samples(), model)
    whole = Feedbacks(model, dataset, tensors)
    passes = module.moment_passes
    monkeypatch.setattr(module, "moment_passes", lambda *a, **k: passes(*a, **{**k, "memory_bytes": 1}))
    parts = Feedbacks(model, dataset, tensors)
    for tensor in tensors:
        one, other = whole.of(tensor), parts.of(tensor)
        assert (one is None) == (other is None) == (not tensor.is_matrix)
        if one is not None and other is not None:
            np.testing.assert_array_equal(one.objective, other.objective)


def test_a_file_is_written_with_feedback(tmp_path: Path) -> None:
    onnx.save(llama_model(SIZES), tmp_path / "net.onnx")
    asked = {"kind": "Q4_0", "data": samples(), "without_tokenizer": True}
    plain = export_gguf(Request(tmp_path / "net.onnx", tmp_path / "a.gguf", **asked))  # type: ignore[arg-type]
    better = export_gguf(Request(tmp_path / "net.onnx", tmp_path / "b.gguf", feedback=True, **asked))  # type: ignore[arg-type]
    assert plain.bits == better.bits
    blocks = []
    for name in ("a.gguf", "b.gguf"):
        with GgufFile(tmp_path / name) as file:
            blocks.append(file.stored("blk.0.ffn_up.weight").copy())
    assert not np.array_equal(*blocks)
    scales = [codes_of(FORMATS[Q4_0], b.reshape(-1, Q4_0.bytes)).d for b in blocks]
    np.testing.assert_array_equal(*scales)


def test_feedback_needs_samples(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--feedback: .*learned from samples"):
        export_gguf(Request(tmp_path / "net.onnx", tmp_path / "a.gguf", feedback=True))
