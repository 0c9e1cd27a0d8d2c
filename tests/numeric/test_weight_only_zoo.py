"""Weight-only formats on a real language model: what 4 bits cost before any calibration."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from weight_only_cases import PROFILE, plan_of, quantized

from bitwright.compiler.ort.audit import audit
from bitwright.compiler.ort.session import config_for, open_session, run
from bitwright.passes.normalize import normalize

pytestmark = pytest.mark.zoo

WINDOWS = 24


def folder() -> Path:
    found = os.environ.get("BITWRIGHT_ZOO")
    if not found:
        pytest.skip("BITWRIGHT_ZOO does not name the folder of real models")
    return Path(found) / "tinylm"


def perplexity(model: ir.Model, tokens: np.ndarray) -> float:
    session = open_session(model, config_for(PROFILE.runtimes.onnxruntime))
    losses = []
    for start in np.linspace(0, len(tokens) - 258, WINDOWS).astype(int):
        window = tokens[start : start + 257]
        logits = run(session, {"input_ids": window[None, :-1]})["logits"][0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses.append((np.log(np.exp(logits).sum(-1)) - logits[np.arange(256), window[1:]]).mean())
    return float(np.exp(np.mean(losses)))


@pytest.fixture(scope="module")
def language_model() -> tuple[ir.Model, np.ndarray, float]:
    model = ir.load(folder() / "model.onnx")
    normalize(model, PROFILE.runtimes.onnxruntime.opset)
    with np.load(folder() / "data.npz") as archive:
        tokens = archive["test"].astype(np.int64)
    return model, tokens, perplexity(model, tokens)


# Largest perplexity over float's, about twice the loss that was measured on 128 windows with rounding to nearest.
@pytest.mark.parametrize(
    ("fmt", "table", "bound"),
    [("w8", "int8", 1.005), ("w4", "w4", 1.02), ("nf4", "w4", 1.03), ("w2", "int8", 1.3)],
)
def test_perplexity(
    language_model: tuple[ir.Model, np.ndarray, float], fmt: str, table: str, bound: float
) -> None:
    model, tokens, reference = language_model
    plan = plan_of(model, fmt, tables=(table,))
    result = quantized(model, plan)
    found = audit(result, config_for(PROFILE.runtimes.onnxruntime))
    constant = sum(d.constant_weight for d in plan.nodes.values())
    assert found.operators["MatMulBnb4" if fmt == "nf4" else "MatMulNBits"] == constant
    assert not found.unexpected
    assert perplexity(result, tokens) <= bound * reference
