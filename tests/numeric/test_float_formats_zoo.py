"""Half precision and dynamic int8 on real models: valid, sorted, executed, and close to float32."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bitwright.compiler.graph.model import node_label
from bitwright.compiler.graph.operands import weight_array, weight_of
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.plan.model import NodeDecision, Plan, WeightQuant
from bitwright.passes.infer_shapes import InferShapes
from bitwright.passes.narrow_floats import NarrowFloats
from bitwright.passes.normalize import normalize
from bitwright.passes.quantize_dynamic import Granularity, QuantizeDynamic
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.round_nearest import RoundNearest
from bitwright.passes.store_narrow import StoreNarrow

FOLDER = os.environ.get("BITWRIGHT_ZOO", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="BITWRIGHT_ZOO names no folder with real models")

MODELS = (
    "kws_dscnn/model.onnx",
    "silero_vad/model.onnx",
    "ppocr_rec/model.onnx",
    "tinylm/model.onnx",
    "nasty/loop_outer_scope_weights.onnx",
    "nasty/if_nested_subgraph_weights.onnx",
    "nasty/bilstm_gru.onnx",
    "nasty/tied_shared_initializers.onnx",
    "nasty/opset23_attention_rope_rmsnorm.onnx",
)


@cache
def normalized(name: str) -> ir.Model:
    model = ir.load(Path(FOLDER) / name)
    normalize(model, 20)
    InferShapes().run(model)
    return model


def load(name: str) -> ir.Model:
    return normalized(name).clone()


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    """Random inputs; a dynamic dimension gets 1 if it is the first, else 16 (a width of pictures 64)."""
    random = np.random.default_rng(0)
    made = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.dtype is not None
        image = len(value.shape) == 4
        dims = [
            d if isinstance(d, int) else (1 if k == 0 else 64 if image else 16)
            for k, d in enumerate(value.shape)
        ]
        kind = value.dtype.numpy()
        made[value.name or ""] = (
            random.standard_normal(dims).astype(kind) if kind.kind == "f" else np.ones(dims, kind)
        )
    return made


def noise_db(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> float:
    """Return the worst signal-to-noise ratio over the float outputs, in decibels."""
    ratios = []
    for name, old in before.items():
        if old.dtype.kind == "f":
            wrong = np.square(old.astype(np.float64) - after[name]).sum() + 1e-30
            ratios.append(10 * np.log10((np.square(old.astype(np.float64)).sum() + 1e-30) / wrong))
    return min(ratios)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", [NarrowFloats(), StoreNarrow(), StoreNarrow("bfloat16")], ids=repr)
def test_half_precision(name: str, step: NarrowFloats | StoreNarrow) -> None:
    model = load(name)
    samples = feeds(model)
    before = run(open_session(model), samples)
    changed = step.run(model).changed
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    after = run(open_session(model), samples)
    # float16 rounds at 68 dB, bfloat16 at 50 dB; tens of layers add up, and noise is no picture to be sure about.
    assert noise_db(before, after) > (20 if step.dtype == "bfloat16" else 38)
    assert changed > 0 or "nasty" in name
    assert step.run(model).changed == 0


@pytest.mark.parametrize("name", ["tinylm/model.onnx", "nasty/tied_shared_initializers.onnx"])
@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_dynamic_int8(name: str, granularity: Granularity) -> None:
    model = load(name)
    samples = feeds(model)
    before = run(open_session(model), samples)
    plan = Plan("test", "onnxruntime")
    for node in model.graph:
        weight = weight_of(node)
        if weight is None or node.op_type not in ("MatMul", "Gemm"):
            continue
        label, array = node_label(node), weight_array(weight)
        scale = np.maximum(np.abs(array).max(axis=0) / 127, 1e-9).astype(np.float32)
        plan.nodes[label] = NodeDecision(label, node.op_type, "int8-row", "anchor", "", weight=label)
        plan.weights[label] = WeightQuant(label, "int8", 1, scale)
    RoundNearest(plan).run(model)
    step = QuantizeDynamic(dict.fromkeys(plan.nodes, granularity))
    assert step.run(model).changed == len(plan.nodes) > 0
    RemoveUnused().run(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    # Eight bits of both operands are about 35 dB a layer.
    assert noise_db(before, run(open_session(model), samples)) > 15
    assert step.run(model).changed == 0
