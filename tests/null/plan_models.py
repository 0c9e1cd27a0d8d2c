"""Small models for planning tests, as ONNX text."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

CNN = """
<ir_version: 8, opset_import: ["" : 17]>
cnn (float[1,3,8,8] x) => (float[1,5] y)
{
  c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
  s = Add(c2, r1)
  r2 = Relu(s)
  p = GlobalAveragePool(r2)
  f = Flatten(p)
  g = Gemm(f, w3, b3)
  y = Softmax(g)
}
"""

MLP_ISLANDS = """
<ir_version: 8, opset_import: ["" : 17]>
block (float[1,4,8] x) => (float[1,4,8] y)
{
  n = LayerNormalization<axis=-1>(x, gamma, beta)
  q = MatMul(n, wq)
  k = MatMul(n, wk)
  kt = Transpose<perm=[0,2,1]>(k)
  scores = MatMul(q, kt)
  p = Softmax(scores)
  v = MatMul(p, n)
  m = MatMul(v, wo)
  o = Add(m, bo)
  y = Add(o, x)
}
"""

CONCAT = """
<ir_version: 8, opset_import: ["" : 17]>
fire (float[1,4,6,6] x) => (float[1,4,6,6] y)
{
  a = Conv(x, wa)
  b = Conv(x, wb)
  c = Concat<axis=1>(a, b)
  m = MaxPool<kernel_shape=[1,1]>(c)
  y = Conv(m, wc)
}
"""


def _arrays(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    CNN: {"w1": (4, 3, 3, 3), "b1": (4,), "w2": (4, 4, 3, 3), "b2": (4,), "w3": (4, 5), "b3": (5,)},
    MLP_ISLANDS: {"gamma": (8,), "beta": (8,), "wq": (8, 8), "wk": (8, 8), "wo": (8, 8), "bo": (8,)},
    CONCAT: {"wa": (2, 4, 1, 1), "wb": (2, 4, 1, 1), "wc": (4, 4, 1, 1)},
}


def build(text: str, seed: int = 0) -> ir.Model:
    """Return the model with random weights, named nodes and inferred shapes."""
    proto = onnx.parser.parse_model(text)
    for name, array in _arrays(seed, SHAPES[text]).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    for node in proto.graph.node:
        node.name = node.output[0]
    proto = onnx.shape_inference.infer_shapes(proto)
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)
