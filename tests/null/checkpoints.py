"""Folders as Hugging Face has them, with random weights: any size, written tensor by tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitwright.compiler.hugging_face.config import read_config
from bitwright.compiler.hugging_face.names import Part, parts_of

# Values that are made and written at once: a tensor of any size takes this much memory.
PIECE = 1 << 21
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ITEMS = {"F32": 4, "F16": 2, "BF16": 2}
Arrays = Callable[[Part], np.ndarray]


@dataclass(frozen=True)
class CheckpointSizes:
    """A decoder to make; ``extra`` is put into config.json as it is."""

    architecture: str = "LlamaForCausalLM"
    layers: int = 2
    width: int = 64
    heads: int = 4
    key_heads: int = 2
    head_width: int | None = None
    feed_forward: int = 96
    vocabulary: int = 80
    positions: int = 64
    base: float = 10000.0
    epsilon: float = 1e-5
    tied: bool = True
    rope: Mapping[str, Any] | None = None
    newer_keys: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Return config.json's content, by default with the older keys of rotary positions."""
        found: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "hidden_size": self.width,
            "intermediate_size": self.feed_forward,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.epsilon,
            **self._rope(),
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
        }
        if self.head_width is not None:
            found["head_dim"] = self.head_width
        if self.architecture == "MistralForCausalLM":
            found["sliding_window"] = None
        return {**found, **self.extra}

    def _rope(self) -> dict[str, Any]:
        if self.newer_keys:
            return {"rope_parameters": {"rope_type": "default", **(self.rope or {}), "rope_theta": self.base}}
        return {"rope_theta": self.base, "rope_scaling": None if self.rope is None else dict(self.rope)}


def write_checkpoint(
    folder: Path,
    sizes: CheckpointSizes | None = None,
    *,
    dtype: str = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    arrays: Arrays | None = None,
) -> Path:
    """Write config.json and safetensors.

    Args:
        folder: Made if it is not there.
        sizes: Of the decoder.
        dtype: float32, float16 or bfloat16.
        shards: Number of files; more than one get an index.
        seed: Of the random weights: the same values whatever the dtype and the shards, before rounding.
        arrays: Returns a tensor in the checkpoint's order instead; by default they are random.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps((sizes or CheckpointSizes()).config(), indent=1))
    parts = parts_of(read_config(folder))
    places: dict[str, str] = {}
    for number in range(shards):
        name = "model.safetensors"
        if shards > 1:
            name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = parts[number * len(parts) // shards : (number + 1) * len(parts) // shards]
        with (folder / name).open("wb") as file:
            _write_parts(file, mine, CODES[dtype], lambda p: _values(p, seed, arrays))
        places |= {p.name: name for p in mine}
    if shards > 1:
        total = sum(math.prod(p.shape) for p in parts) * ITEMS[CODES[dtype]]
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_parts(
    file: BinaryIO, parts: Sequence[Part], code: str, values: Callable[[Part], Iterator[np.ndarray]]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        start, end = end, end + math.prod(part.shape) * ITEMS[code]
        header[part.name] = {"dtype": code, "shape": list(part.shape), "data_offsets": [start, end]}
    file.write(safetensors_header(header))
    for part in parts:
        for piece in values(part):
            file.write(stored(piece, code).tobytes())


def safetensors_header(header: Mapping[str, Any]) -> bytes:
    """Return a file's start, padded with spaces to eight bytes."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def stored(values: np.ndarray, code: str) -> np.ndarray:
    """Return float32 values as they are stored; bfloat16 rounds to nearest, ties to even."""
    if code != "BF16":
        return values.astype({"F32": "<f4", "F16": "<f2"}[code])
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")


def _values(part: Part, seed: int, arrays: Arrays | None) -> Iterator[np.ndarray]:
    """Yield the values of a tensor in pieces: gains near one, all else of variance 1 / inputs."""
    if arrays is not None:
        yield arrays(part).ravel()
        return
    # Every tensor has its own stream, so that neither order nor dtype nor shards change its values.
    random = np.random.default_rng([seed, *part.name.encode()])
    count = math.prod(part.shape)
    gains = len(part.shape) == 1 and "norm" in part.name
    scale = np.float32(0.1 if len(part.shape) == 1 else part.shape[1] ** -0.5)
    for start in range(0, count, PIECE):
        piece = random.standard_normal(min(PIECE, count - start), np.float32) * scale
        yield piece + np.float32(1) if gains else piece


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Decoders whose logits are compared with those that the transformers library computed: tests/golden.
COMPARED: dict[str, tuple[CheckpointSizes, str]] = {
    "llama, tied": (CheckpointSizes(), "bfloat16"),
    "llama, head of its own": (CheckpointSizes(tied=False, base=500000.0), "float16"),
    "llama, biases": (
        CheckpointSizes(key_heads=4, extra={"attention_bias": True, "mlp_bias": True}),
        "float32",
    ),
    "llama, positions stretched": (CheckpointSizes(rope={"type": "linear", "factor": 4.0}), "float32"),
    "llama 3": (CheckpointSizes(head_width=32, base=500000.0, rope=LLAMA3, positions=256), "float32"),
    "llama 3, newer keys": (
        CheckpointSizes(tied=False, newer_keys=True, base=500000.0, rope=LLAMA3, positions=256),
        "bfloat16",
    ),
    "mistral": (
        CheckpointSizes(architecture="MistralForCausalLM", head_width=24, tied=False),
        "float32",
    ),
    "qwen2": (
        CheckpointSizes(
            architecture="Qwen2ForCausalLM",
            base=1000000.0,
            epsilon=1e-6,
            extra={"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2},
        ),
        "bfloat16",
    ),
    "qwen3": (
        CheckpointSizes(architecture="Qwen3ForCausalLM", head_width=32, base=1000000.0, epsilon=1e-6),
        "bfloat16",
    ),
    "qwen3, biases, newer keys": (
        CheckpointSizes(
            architecture="Qwen3ForCausalLM",
            head_width=48,
            tied=False,
            newer_keys=True,
            extra={"attention_bias": True, "use_sliding_window": False, "sliding_window": None},
        ),
        "float32",
    ),
    "mistral, a window": (
        CheckpointSizes(architecture="MistralForCausalLM", tied=False, extra={"sliding_window": 9}),
        "float32",
    ),
    "qwen2, windows in the last layers": (
        CheckpointSizes(
            architecture="Qwen2ForCausalLM",
            layers=3,
            extra={"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        ),
        "float32",
    ),
    "qwen3, a window in the first layer": (
        CheckpointSizes(
            architecture="Qwen3ForCausalLM",
            head_width=16,
            extra={
                "use_sliding_window": True,
                "sliding_window": 12,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        "float32",
    ),
}


def compared_tokens(sizes: CheckpointSizes) -> np.ndarray:
    """Return the tokens that those logits belong to."""
    return np.arange(48) * 31 % sizes.vocabulary
