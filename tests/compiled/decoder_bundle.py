"""A small decoder, and what it is compiled with for the tests of caches of fixed capacity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from llama_models import Sizes, llama_model

from bitwright.compiler.options import Options

SIZES = Sizes(
    layers=2, width=64, heads=4, key_heads=2, feed_forward=96, vocabulary=48, positions=64, cache=True
)
CONTEXT = 48
PIECES = (1, 8)


def sequences(count: int = 6, length: int = 30) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(3).integers(0, SIZES.vocabulary, (count, length))}


def decoder_options(folder: Path, **changes: object) -> Options:
    """Return options that compile the decoder in 4 bits, its model written into the folder."""
    path = folder / "decoder.onnx"
    onnx.save(llama_model(SIZES), path)
    plain = {
        "target": "host",
        "data": sequences(),
        "output": folder / "out",
        "recipe": "w4",
        "context": CONTEXT,
        "buckets": {"T": PIECES},
        "golden": 1,
        "static": "tiny" if changes.get("target", "host") == "host" else None,
    }
    return Options(model=path, **{**plain, **changes})  # type: ignore[arg-type]
