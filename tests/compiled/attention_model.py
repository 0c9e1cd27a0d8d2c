"""A small attention layer with a mask, free in batch and length, and data of many lengths for it."""

from pathlib import Path

import numpy as np
import onnx

# pooled: the mean of the tokens, masked as {pool} says.
MODEL = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[N, T, 16] x, float[N, T] mask) => (float[N, T, 16] tokens, float[N, 8] pooled)
<float one = {{1}}, float far = {{-10000}}, int64[1] axis1 = {{1}}, int64[1] axis2 = {{2}}>
{{
  q = MatMul (x, wq)
  k = MatMul (x, wk)
  v = MatMul (x, wv)
  kt = Transpose <perm = [0, 2, 1]> (k)
  scores = MatMul (q, kt)
  hidden = Sub (one, mask)
  bias = Mul (hidden, far)
  bias3 = Unsqueeze (bias, axis1)
  masked = Add (scores, bias3)
  weights = Softmax <axis = -1> (masked)
  mixed = MatMul (weights, v)
  made = MatMul (mixed, wo)
  tokens = Relu (made)
  mask3 = Unsqueeze (mask, axis2)
  {pool}
  pooled = MatMul (mean, wp)
}}
"""
MASKED = """kept = Mul (tokens, mask3)
  sum = ReduceSum <keepdims = 0> (kept, axis1)
  count = ReduceSum <keepdims = 0> (mask3, axis1)
  mean = Div (sum, count)"""
LEAKING = "mean = ReduceMean <keepdims = 0> (tokens, axis1)"
LENGTHS = (3, 5, 7, 8, 11, 12, 2, 9)


def write_model(path: Path, pool: str = MASKED) -> Path:
    proto = onnx.parser.parse_model(MODEL.format(pool=pool))
    generator = np.random.default_rng(5)
    for name, shape in {
        "wq": (16, 16),
        "wk": (16, 16),
        "wv": (16, 16),
        "wo": (16, 16),
        "wp": (16, 8),
    }.items():
        array = (generator.normal(size=shape) * 0.3).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, path)
    return path


def sample(length: int, seed: int, batch: int = 1) -> dict[str, np.ndarray]:
    x = np.random.default_rng(seed).normal(size=(batch, length, 16)).astype(np.float32)
    return {"x": x, "mask": np.ones((batch, length), np.float32)}


def samples() -> list[dict[str, np.ndarray]]:
    return [sample(length, seed) for seed, length in enumerate(LENGTHS * 3)]
