"""An export with a mask and positions as inputs, compiled: it writes what the graph as exported writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from masked_models import masked_model

import bitwright
from bitwright.compiler.bundle.decoder import CompiledDecoder
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.errors import DataError

CONTEXT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("masked")
    onnx.save(masked_model(), found / "model.onnx")
    stream = np.random.default_rng(0).integers(0, 257, 300)
    np.savez(found / "tokens.npz", tokens=stream)
    bitwright.compile(
        found / "model.onnx",
        target="host",
        data=f"{found / 'tokens.npz'}:tokens,window=20,windows=6",
        output=found / "out",
        recipe="w8",
        context=CONTEXT,
        buckets={"T": (1, 8)},
        unpadded=True,
        golden=1,
    )
    return found


def test_every_function_is_verified(folder: Path) -> None:
    result = verify(folder / "out")
    assert result.passed and result.executed == "native"


def test_logits_are_those_of_the_export(folder: Path) -> None:
    metric = f"perplexity:{folder / 'tokens.npz'}:tokens,window=32,windows=4"
    exact, found = (bitwright.evaluate(folder / name, metric) for name in ("model.onnx", "out"))
    assert exact.perplexity is not None and found.perplexity is not None
    # Weights and activations of 8 bits, a scale a group of 32.
    assert found.perplexity.nll == pytest.approx(exact.perplexity.nll, abs=0.02)


def test_calls_beyond_the_caches_are_refused(folder: Path) -> None:
    for call in (
        lambda: bitwright.generate(folder / "out", tokens=range(CONTEXT + 1), max_tokens=1),
        lambda: bitwright.evaluate(folder / "out", f"perplexity:{folder / 'tokens.npz'}:tokens,window=41"),
    ):
        with pytest.raises(DataError, match=f"41 tokens, the model takes {CONTEXT}"):
            call()
    found = bitwright.generate(folder / "out", tokens=[1, 2, 3], max_tokens=100)
    assert found.reason == "context" and len(found.tokens) == CONTEXT - 3 + 1
    decoder = CompiledDecoder(folder / "out", threads=1)
    decoder.feed(range(CONTEXT))
    with pytest.raises(DataError, match=f"1 tokens behind {CONTEXT}, where the caches hold {CONTEXT}"):
        decoder.feed([1])
    assert decoder.length == CONTEXT
