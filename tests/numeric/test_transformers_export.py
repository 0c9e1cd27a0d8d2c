"""Decoders as PyTorch exports them from the transformers library are found and proven. Needs both packages."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import COMPARED, CheckpointSizes, write_checkpoint

from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.to_gguf.export import open_decoder
from bitwright.passes.assume_unpadded import AssumeUnpadded
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention
from bitwright.passes.normalize import normalize

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torch = pytest.importorskip("torch", reason="the torch extra is not installed")
pytestmark = pytest.mark.slow

CACHED, NEW, BATCH = 3, 6, 2
# Attention implementation, exporter (torch.export or TorchScript), opset.
EXPORTERS = [
    ("eager", True, 18),
    ("sdpa", True, 18),
    ("sdpa", True, 23),
    ("eager", False, 17),
    ("sdpa", False, 17),
]


class WithCache(torch.nn.Module):  # type: ignore[misc]
    """A decoder whose cache goes in and out as tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Any, mask: Any, positions: Any, *cache: Any) -> Any:
        layers = transformers.DynamicCache()
        for layer in range(len(cache) // 2):
            layers.update(cache[2 * layer], cache[2 * layer + 1], layer)
        found = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=layers,
            use_cache=True,
        )
        return (
            found.logits,
            *(v for layer in found.past_key_values.layers for v in (layer.keys, layer.values)),
        )


def export(folder: Path, path: Path, attention: str, opset: int, *, dynamo: bool) -> dict[str, np.ndarray]:
    """Write a decoder; return what it is given and, as ``logits``, what it gives, random caches in front."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    config = model.config
    width = model.model.layers[0].self_attn.head_dim
    shape = (BATCH, config.num_key_value_heads, CACHED, width)
    torch.manual_seed(0)
    cache = [torch.randn(shape) for _ in range(2 * config.num_hidden_layers)]
    tokens = torch.arange(BATCH * NEW).reshape(BATCH, NEW)
    positions = torch.arange(CACHED, CACHED + NEW)[None].repeat(BATCH, 1)
    inputs = (tokens, torch.ones(BATCH, CACHED + NEW, dtype=torch.int64), positions, *cache)
    names = ["input_ids", "attention_mask", "position_ids", *(f"past_{k}" for k in range(len(cache)))]
    sizes: dict[str, Any] = {
        "dynamic_axes": {n: {0: "N", **({2: "P"} if "past" in n else {1: f"{n}_T"})} for n in names}
    }
    if dynamo:
        free = torch.export.Dim.DYNAMIC
        sizes = {"dynamic_shapes": (*[{0: free, 1: free}] * 3, tuple({0: free, 2: free} for _ in cache))}
        sizes["external_data"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            WithCache(model), inputs, str(path), input_names=names, opset_version=opset, dynamo=dynamo,
            verbose=False, **sizes,
        )  # fmt: skip
    with torch.no_grad():
        logits = WithCache(model)(*inputs)[0]
    given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    return {**given, "logits": logits.numpy()}


@pytest.mark.parametrize(("attention", "dynamo", "opset"), EXPORTERS)
@pytest.mark.parametrize("case", ["llama, tied", "llama 3", "qwen2", "qwen3"])
def test_exported_decoders_are_found(
    case: str, attention: str, dynamo: bool, opset: int, tmp_path: Path
) -> None:
    sizes, _ = COMPARED[case]
    folder = write_checkpoint(tmp_path / "folder", sizes, dtype="float32")
    export(folder, tmp_path / "net.onnx", attention, opset, dynamo=dynamo)
    found = open_decoder(tmp_path / "net.onnx")
    # Float32 sums in another order, and angles that transformers computes in float32.
    assert found.proof < 1e-5
    assert found.decoder.caches is not None and found.decoder.tied == sizes.tied
    assert found.decoder.hyper.base == sizes.base


@pytest.mark.parametrize(("attention", "dynamo", "opset"), EXPORTERS)
@pytest.mark.parametrize("case", ["llama, tied", "llama 3", "qwen2", "qwen3"])
def test_attention_is_fused_where_nobody_is_padded(
    case: str, attention: str, dynamo: bool, opset: int, tmp_path: Path
) -> None:
    sizes, _ = COMPARED[case]
    folder = write_checkpoint(tmp_path / "folder", sizes, dtype="float32")
    given = export(folder, tmp_path / "net.onnx", attention, opset, dynamo=dynamo)
    model = read_model(tmp_path / "net.onnx").model
    assert AssumeUnpadded().run(model).changed == 2
    normalize(model, 20)
    assert FuseDecoderAttention().run(model).changed == sizes.layers
    # ONNX Runtime's operator takes several tokens behind a cache of one sequence alone.
    alone = {name: array[:1] for name, array in given.items()}
    found = next(iter(run(open_session(model), alone).values()))
    expected = alone["logits"]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


# Shorter than what is in the cache and new; the first is every layer's, the second the last layer's alone.
WINDOWED = {
    "mistral": (
        CheckpointSizes(architecture="MistralForCausalLM", tied=False, extra={"sliding_window": 4}),
        (4, 4),
    ),
    "qwen3": (
        CheckpointSizes(
            architecture="Qwen3ForCausalLM",
            head_width=32,
            extra={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        ),
        (None, 5),
    ),
}


@pytest.mark.parametrize(("attention", "dynamo", "opset"), EXPORTERS)
@pytest.mark.parametrize("case", WINDOWED)
def test_windows_are_found(case: str, attention: str, dynamo: bool, opset: int, tmp_path: Path) -> None:
    sizes, windows = WINDOWED[case]
    folder = write_checkpoint(tmp_path / "folder", sizes, dtype="float32")
    given = export(folder, tmp_path / "net.onnx", attention, opset, dynamo=dynamo)
    found = open_decoder(tmp_path / "net.onnx")
    assert found.decoder.hyper.windows == windows and found.proof < 1e-5
    model = read_model(tmp_path / "net.onnx").model
    AssumeUnpadded().run(model)
    normalize(model, 20)
    assert FuseDecoderAttention().run(model).changed == sizes.layers
    nodes = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert [n.attributes.get_int("local_window_size", -1) for n in nodes] == [w or -1 for w in windows]
    alone = {name: array[:1] for name, array in given.items()}
    logits = next(iter(run(open_session(model), alone).values()))
    expected = alone["logits"]
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()
