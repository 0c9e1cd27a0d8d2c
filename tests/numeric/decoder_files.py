"""Small decoders with everything beside them that a folder of a language model holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from checkpoints import CheckpointSizes, write_checkpoint

from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
from bitwright.compiler.hugging_face.graph import FloatName, Form, decoder_model

END = 256
SIZES = CheckpointSizes(vocabulary=257, positions=48)


def write_decoder(
    folder: Path, form: Form = "cache", dtype: FloatName = "float32", *, seed: int = 0, end: int | None = END
) -> Path:
    """Write model.onnx, a tokenizer whose tokens are the 256 bytes and ``<end>``, and what ends a text."""
    source = write_checkpoint(folder / "source", SIZES, dtype="float32", seed=seed)
    path = folder / "model.onnx"
    save_model(decoder_model(open_checkpoint(source), form, dtype), path)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    if end is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    return path


def byte_tokenizer() -> dict[str, object]:
    """Return a tokenizer.json without merges: a token is a byte, in GPT-2's printable alphabet."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    alphabet = {byte: chr(byte) for byte in own} | {byte: chr(256 + k) for k, byte in enumerate(others)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": END,
                "content": "<end>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {alphabet[byte]: byte for byte in range(256)}, "merges": []},
    }


def tokens(count: int, seed: int = 0) -> np.ndarray:
    """Return random token numbers."""
    return np.random.default_rng(seed).integers(0, 256, count)
