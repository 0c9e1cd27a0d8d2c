"""Decoders of operators compute in ONNX Runtime what the spelled-out decoder of the same weights computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from llama_models import Sizes, llama_model
from llama_operators import SPELLINGS, operator_model

from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.to_gguf.export import open_decoder

# Float32 sums in another order, logits of about one.
SINGLE = 1e-5


def logits(proto: onnx.ModelProto, tokens: np.ndarray, sizes: Sizes) -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        i.name: np.zeros((1, sizes.key_heads, 0, sizes.head_width), np.float32) for i in session.get_inputs()
    }
    found: np.ndarray = session.run(["scores"], {**feeds, "ids": tokens[None]})[0]
    return found


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cache"])
@pytest.mark.parametrize("case", SPELLINGS)
def test_the_function_is_the_same_and_proven(case: str, cache: bool, tmp_path: Path) -> None:
    spelling = SPELLINGS[case]
    key_heads = 4 if spelling.attention == "MultiHeadAttention" else 2
    sizes = Sizes(cache=cache, tied=False, key_heads=key_heads)
    proto = operator_model(spelling, sizes)
    tokens = np.arange(20) * 7 % sizes.vocabulary
    expected = logits(llama_model(sizes), tokens, sizes)
    assert np.abs(logits(proto, tokens, sizes) - expected).max() < SINGLE
    onnx.save(proto, tmp_path / "net.onnx")
    assert open_decoder(tmp_path / "net.onnx").proof < SINGLE


def test_norms_of_onnx_runtime_are_read_as_what_they_compute(tmp_path: Path) -> None:
    spelling, sizes = SPELLINGS["multi-head"], Sizes(key_heads=4, tied=False)
    proto = operator_model(spelling, sizes)
    onnx.save(proto, tmp_path / "net.onnx")
    read = read_model(tmp_path / "net.onnx").model
    assert "SimplifiedLayerNormalization" not in {n.op_type for n in read.graph}
    tokens = np.arange(20)
    found = run(open_session(read), {"ids": tokens[None]})["scores"]
    assert np.abs(found - logits(proto, tokens, sizes)).max() < SINGLE
