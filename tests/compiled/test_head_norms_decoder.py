"""A decoder with norms of query and key heads, compiled: verified, and the logits of the float model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import CheckpointSizes, write_checkpoint

import bitwright
from bitwright.compiler.bundle.verify import verify

SIZES = CheckpointSizes(architecture="Qwen3ForCausalLM", head_width=32, positions=64)
CONTEXT = 40


def exported(folder: Path, sizes: CheckpointSizes) -> Path:
    write_checkpoint(folder / "folder", sizes)  # the same weights, whatever the window
    np.savez(folder / "tokens.npz", tokens=np.random.default_rng(0).integers(0, 80, 300))
    return bitwright.export(folder / "folder", output=folder / "model.onnx").path


def compiled(folder: Path, model: Path) -> Path:
    bitwright.compile(
        model,
        target="host",
        data=f"{folder / 'tokens.npz'}:tokens,window=20,windows=6",
        output=folder / "out",
        recipe="w8",
        context=CONTEXT,
        buckets={"T": (1, 8)},
        golden=1,
    )
    return folder / "out"


def test_the_artifact_computes_what_the_model_does(tmp_path: Path) -> None:
    model = exported(tmp_path, SIZES)
    out = compiled(tmp_path, model)
    result = verify(out)
    assert result.passed and result.executed == "native"
    metric = f"perplexity:{tmp_path / 'tokens.npz'}:tokens,window=32,windows=4"
    exact, found = (bitwright.evaluate(path, metric) for path in (model, out))
    assert exact.perplexity is not None and found.perplexity is not None
    # Weights and activations of 8 bits, a scale a group of 32.
    assert found.perplexity.nll == pytest.approx(exact.perplexity.nll, abs=0.02)


def test_windows_are_the_artifacts_own(tmp_path: Path) -> None:
    extra = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}
    model = exported(tmp_path, replace(SIZES, extra=extra))
    out = compiled(tmp_path, model)
    assert verify(out).passed
    metric = f"perplexity:{tmp_path / 'tokens.npz'}:tokens,window=39,windows=4"
    exact, found = (bitwright.evaluate(path, metric) for path in (model, out))
    assert exact.perplexity is not None and found.perplexity is not None
    assert found.perplexity.nll == pytest.approx(exact.perplexity.nll, abs=0.02)
    whole = exported(tmp_path / "whole", SIZES)
    other = bitwright.evaluate(whole, metric).perplexity
    assert other is not None and abs(other.nll - exact.perplexity.nll) > 0.05, (
        "the window changes what is measured"
    )
