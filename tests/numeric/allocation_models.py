"""Small models to choose formats for, with their samples."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

RNG = np.random.default_rng(5)
CNN = """
<ir_version: 8, opset_import: ["" : 17]>
cnn (float[1,16,8,8] x) => (float[1,32] y)
{
  c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)
  r1 = Relu(c1)
  c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)
  s = Add(c2, r1)
  p = GlobalAveragePool(s)
  f = Flatten(p)
  y = Gemm(f, w3, b3)
}
"""
MLP = """
<ir_version: 8, opset_import: ["" : 17]>
mlp (float[1,4,64] x) => (float[1,4,64] y)
{
  a = MatMul(x, wa)
  ga = Tanh(a)
  b = MatMul(ga, wb)
  gb = Softmax(b)
  y = MatMul(gb, wc)
}
"""
WEIGHTS = {
    CNN: {"w1": (32, 16, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "b2": (32,), "w3": (32, 32), "b3": (32,)},
    MLP: {"wa": (64, 128), "wb": (128, 128), "wc": (128, 64)},
}
SHAPES = {CNN: (1, 16, 8, 8), MLP: (1, 4, 64)}


def build(text: str) -> ir.Model:
    rng = np.random.default_rng(7)
    proto = onnx.parser.parse_model(text)
    for name, shape in WEIGHTS[text].items():
        weight = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) + 1)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(weight, name))
    return ir.from_proto(proto)


SAMPLES = {
    text: [{"x": RNG.standard_normal(shape).astype(np.float32)} for _ in range(6)]
    for text, shape in SHAPES.items()
}
