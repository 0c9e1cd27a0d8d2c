"""A model with an operator that TVM lacks between two quantized products, for the tests of hybrid artifacts."""

from pathlib import Path

import numpy as np
import onnx

# Two quantized products with a GRU between them, and an output that needs no GRU.
RECURRENT = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[6, 1, 32] x) => (float[6, 1, 24] y, float[6, 1, 16] s)
{
  [project] a = MatMul(x, wa)
  s = Sigmoid(a)
  [gru] h, last = GRU <hidden_size = 16> (a, w, r)
  flat = Squeeze(h, one)
  [head] y = MatMul(flat, wb)
}
"""
SHAPES = {"wa": (32, 16), "w": (1, 48, 16), "r": (1, 48, 16), "wb": (16, 24)}


def save(path: Path, text: str, **initializers: np.ndarray) -> Path:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in initializers.items())
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    return path


def save_recurrent(path: Path) -> Path:
    generator = np.random.default_rng(0)
    weights = {n: generator.normal(0, 0.2, shape).astype("float32") for n, shape in SHAPES.items()}
    return save(path, RECURRENT, one=np.array([1], "int64"), **weights)


def samples(count: int = 12) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(1)
    return [{"x": generator.normal(size=(6, 1, 32)).astype("float32")} for _ in range(count)]
