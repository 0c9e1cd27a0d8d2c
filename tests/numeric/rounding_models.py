"""A small model of every kind of anchor, its calibration data, and a hand-made plan."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from bitwright.compiler.calibrate.moments import collect_moments
from bitwright.compiler.ingest.dataset import dataset_from_memory
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.plan.model import ActivationQuant, NodeDecision, Plan, WeightQuant
from bitwright.compiler.plan.quantizers import activation_params
from bitwright.targets.schema import QSpace

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[N, 4, 6, 6] x) => (float[N, 8] y)
<float[1] wa = {0}, float[1] ba = {0}, float[1] wb = {0}, float[1] wc = {0},
 float[1] wd = {0}, float[1] bd = {0}, float[1] we = {0}>
{
  a = Conv <pads = [1, 1, 1, 1]> (x, wa, ba)
  ra = Relu (a)
  b = Conv <pads = [1, 1, 1, 1], group = 8> (ra, wb)
  rb = Relu (b)
  c = Conv <group = 2, strides = [2, 2]> (rb, wc)
  f = Flatten (c)
  d = MatMul (f, wd)
  s = Add (d, bd)
  rs = Relu (s)
  y = Gemm (rs, we)
}
"""
SHAPES = {
    "wa": (8, 4, 3, 3),
    "ba": (8,),
    "wb": (8, 1, 3, 3),
    "wc": (6, 4, 2, 2),
    "wd": (54, 32),
    "bd": (32,),
    "we": (32, 8),
}
# Node, its data, its weight, and the axis of its output channels.
ANCHORS = (
    ("a", "x", "wa", 0),
    ("b", "ra", "wb", 0),
    ("c", "rb", "wc", 0),
    ("d", "f", "wd", 1),
    ("y", "rs", "we", 1),
)
SAMPLES = 12


def build() -> ir.Model:
    """Return the model with random weights."""
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        array = rng.normal(0, 0.4, shape).astype(np.float32)
        value = model.graph.initializers[name]
        value.const_value, value.shape = ir.Tensor(array, name=name), ir.Shape(shape)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def samples() -> list[dict[str, np.ndarray]]:
    """Return images whose channels are correlated, so that rounding can make errors good."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(4, 4))
    return [
        {"x": (np.einsum("cd,dhw->chw", mixing, rng.normal(size=(4, 6, 6))) + 0.5)[None].astype(np.float32)}
        for _ in range(SAMPLES)
    ]


def moments_of(model: ir.Model) -> dict[str, InputMoments]:
    """Return the moments of all anchors; every row is kept."""
    return collect_moments(model, dataset_from_memory(samples(), model), [a[0] for a in ANCHORS])


def values_of(model: ir.Model, names: list[str]) -> dict[str, np.ndarray]:
    """Return tensors of the model on all samples, joined."""
    copy = model.clone()
    found = {o.name: o for n in copy.graph for o in n.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(found[n] for n in names)
    # As written: an optimized session would quantize the float inputs of weight-only layers.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(copy).SerializeToString(), options)
    runs = [session.run(names, feeds) for feeds in samples()]
    return {name: np.concatenate([r[k] for r in runs]) for k, name in enumerate(names)}


def make_plan(model: ir.Model, *, bits: int = 8, activations: bool = True) -> Plan:
    """Return a plan that quantizes all anchors: weights per channel, activations in 8 bits."""
    plan = Plan("test", "onnxruntime")
    data = values_of(model, ["ra", "rb", "f", "rs"]) | {"x": np.concatenate([s["x"] for s in samples()])}
    for node, source, weight, axis in ANCHORS:
        inputs = (source,) if activations else ()
        plan.nodes[node] = NodeDecision(node, "", "int8", "anchor", "", inputs=inputs, weight=weight)
        array = model.graph.initializers[weight].const_value.numpy()  # type: ignore[union-attr]
        others = tuple(k for k in range(array.ndim) if k != axis)
        scale = np.abs(array).max(axis=others) / np.float32(2 ** (bits - 1) - 1)
        plan.weights[weight] = WeightQuant(weight, "int8", axis, scale.astype(np.float32), bits=bits)
        if activations:
            low, high = float(data[source].min()), float(data[source].max())
            params = activation_params(low, high, QSpace(bits=8, signed=False))
            plan.activations[source] = ActivationQuant(source, *params, low, high)
    return plan
