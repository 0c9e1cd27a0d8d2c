"""Small decoders that are quantized part by part: how, and what is read of the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from llama_models import Sizes
from onnx import numpy_helper

from bitwright.compiler.options import Options

SIZES = Sizes(layers=2, cache=True, tied=False, positions=48)
# A table that is worth quantizing (65536 elements) and is the head, too.
TIED = replace(SIZES, layers=1, tied=True, vocabulary=1024)
SHARED = """
schema: 1
name: shared
formats: [w4]
tables: [w4]
migrate: {equalize: false, smooth: false, disassemble: 0.0}
rounding: {scales: mse, method: METHOD, refine: false, correct_bias: falseSTORED}
"""


def shared_recipe(method: str, stored: str | None = None) -> str:
    """Return a recipe of one format for the table and all else, rounded by ``method``, with scales ``stored`` so."""
    return SHARED.replace("METHOD", method).replace("STORED", f", stored_scales: {stored}" if stored else "")


def tokens_of(sizes: Sizes, folder: Path) -> str:
    """Write a stream of tokens and return how it is named as data: six windows, each behind an empty cache."""
    stream = np.random.default_rng(3).integers(0, sizes.vocabulary, 128)
    np.savez(folder / "tokens.npz", calibration=stream.astype(np.int32))
    return f"{folder / 'tokens.npz'}:calibration,window=16,windows=6"


def feeds_of(sizes: Sizes) -> dict[str, np.ndarray]:
    """Return a prompt behind an empty cache."""
    shape = (1, sizes.key_heads, 0, sizes.head_width)
    names = [f"past_{p}{n}" for n in range(sizes.layers) for p in "kv"] if sizes.cache else []
    return {"ids": np.arange(20)[None] % sizes.vocabulary, **{n: np.zeros(shape, np.float32) for n in names}}


def options(folder: Path, model: onnx.ModelProto, sizes: Sizes = SIZES, **changes: object) -> Options:
    onnx.save(model, folder / "model.onnx")
    given = Options(
        model=folder / "model.onnx",
        target="host",
        data=tokens_of(sizes, folder),
        output=folder / "q.onnx",
        recipe="w4",
        stream="float",
        gate=False,
    )
    return replace(given, **changes)  # type: ignore[arg-type]


def arrays(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def logits(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["scores"], feeds)[0]
