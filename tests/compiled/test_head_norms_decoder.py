"""A decoder with norms of query and key heads, compiled: verified, and the logits of the float model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints import CheckpointSizes, write_checkpoint

import bitwright
from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.errors import UsageError

SIZES = CheckpointSizes(architecture="Qwen3ForCausalLM", head_width=32, positions=64)
CONTEXT = 40


def exported(folder: Path, sizes: CheckpointSizes) -> Path:
    write_checkpoint(folder / "folder", sizes)
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


def test_windows_shorter_than_the_caches_are_refused(tmp_path: Path) -> None:
    sizes = CheckpointSizes(architecture="MistralForCausalLM", extra={"sliding_window": 24})
    model = exported(tmp_path, sizes)
    with pytest.raises(UsageError, match="attention sees 24 positions, fewer than 40"):
        compiled(tmp_path, model)
    assert not (tmp_path / "out").exists()
