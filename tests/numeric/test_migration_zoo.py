"""Scale migration on real transformers: post-norm and Gelu, RMSNorm, grouped-query attention and SwiGLU."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from linear_models import Samples
from pass_harness import assert_equal_outputs, run_onnxruntime
from test_passes_zoo import data, minilm, zoo

from bitwright.compiler.calibrate.moments import collect_moments
from bitwright.compiler.graph.model import is_op, node_label
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.moments import InputMoments
from bitwright.passes.disassemble_channels import DisassembleChannels
from bitwright.passes.linear_inputs import linear_inputs, rewrite_weights
from bitwright.passes.normalize import normalize
from bitwright.passes.rewriting import fresh_names
from bitwright.passes.scale_folding import apply_fold, find_fold
from bitwright.passes.smooth_scales import SmoothScales

pytestmark = pytest.mark.zoo

BOUND = 1e-4  # float32 rounding through six layers, relative to the largest output value
FEW_ALPHAS = (0.5, 0.7, 0.9)


def anchors(model: ir.Model) -> list[str]:
    return [node_label(n) for n in model.graph if is_op(n, "MatMul", "Gemm") and weight_of(n) is not None]


def moments_of(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> dict[str, InputMoments]:
    return collect_moments(model, Samples(samples), anchors(model), rows=64)


def test_minilm_computes_the_same_and_its_outliers_are_gone() -> None:
    model = read_model(minilm()).model.clone()
    normalize(model)
    texts = data("minilm_l6")
    samples = [
        {
            "input_ids": ids[None, :length].astype(np.int64),
            "attention_mask": np.ones((1, int(length)), np.int64),
        }
        for ids, length in zip(texts["calib_ids"][:16], texts["calib_len"][:16], strict=True)
    ]
    before = run_onnxruntime(model, samples[0])
    moments = moments_of(model, samples)
    split = DisassembleChannels(moments).run(model)
    smooth = SmoothScales(moments, alphas=FEW_ALPHAS).run(model)
    assert_equal_outputs(before, run_onnxruntime(model, samples[0]), BOUND)
    assert split.changed >= 3  # the Gelu outputs of the first layers
    assert smooth.changed >= 6  # half of the twelve LayerNorm outputs
    for label, fresh in moments_of(model, samples[:4]).items():
        assert fresh.largest.max() <= moments[label].largest.max() * 1.001, label


def test_tinylm_computes_the_same_with_every_input_scaled_and_no_operator_added() -> None:
    """Whatever the factors are, they fold into RMSNorm gains, value columns shared by heads and up-projections."""
    model = read_model(zoo() / "tinylm" / "model.onnx").model.clone()
    normalize(model)
    operators = Counter(n.op_type for n in model.graph)
    tokens = data("tinylm")["calib"].astype(np.int64)
    sample = {"input_ids": tokens[None, :48]}
    before = run_onnxruntime(model, sample)
    names, random = fresh_names(model), np.random.default_rng(0)
    found = linear_inputs(model, moments_of(model, [sample]), "test")
    assert len(found) == 25  # four of each of the six layers, and the output projection
    for one in found:
        fold = find_fold(one.value, one.readers, one.channels)
        assert fold.sites, fold.why_not
        scale = np.exp(random.standard_normal(one.channels))[fold.groups]
        rewrite_weights(one, None, scale, names)
        apply_fold(fold, 1 / scale, names)
    assert_equal_outputs(before, run_onnxruntime(model, sample), BOUND)
    assert Counter(n.op_type for n in model.graph) == operators
