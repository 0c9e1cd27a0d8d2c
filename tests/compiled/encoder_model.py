"""A small sentence encoder, free in its length, as exporters write them; and texts for it."""

from pathlib import Path

import numpy as np
import onnx

WORDS, POSITIONS, WIDTH, HEADS, INNER = 100, 160, 48, 3, 80
MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
g (int64[N, T] ids, int64[N, T] mask) => (float[N, T, 48] tokens, float[N, 48] pooled)
<int64 one = {1}, int64[1] zero1 = {0}, int64[1] one1 = {1}, int64[1] two1 = {2}, int64[1] heads = {3},
 int64[1] each = {16}, int64[1] width = {48}, float far = {-10000}, float unit = {1}, float root = {4},
 float half = {0.5}, float sqrt2 = {1.41421356}>
{
  shape = Shape (ids)
  N1 = Slice (shape, zero1, one1)
  T1 = Slice (shape, one1, two1)
  word = Gather (words, ids)
  place = Slice (positions, zero1, T1, zero1)
  place3 = Unsqueeze (place, zero1)
  sum = Add (word, place3)
  x = LayerNormalization <axis = -1> (sum, g0, b0)
  mask3 = Unsqueeze (mask, one1)
  mask4 = Unsqueeze (mask3, two1)
  maskf = Cast <to = 1> (mask4)
  hidden = Sub (unit, maskf)
  bias = Mul (hidden, far)
  split = Concat <axis = 0> (N1, T1, heads, each)
  joined = Concat <axis = 0> (N1, T1, width)
  q0 = MatMul (x, wq)
  q1 = Reshape (q0, split)
  q = Transpose <perm = [0, 2, 1, 3]> (q1)
  k0 = MatMul (x, wk)
  k1 = Reshape (k0, split)
  k = Transpose <perm = [0, 2, 3, 1]> (k1)
  v0 = MatMul (x, wv)
  v1 = Reshape (v0, split)
  v = Transpose <perm = [0, 2, 1, 3]> (v1)
  scores0 = MatMul (q, k)
  scores1 = Div (scores0, root)
  scores = Add (scores1, bias)
  weights = Softmax <axis = -1> (scores)
  mixed0 = MatMul (weights, v)
  mixed1 = Transpose <perm = [0, 2, 1, 3]> (mixed0)
  mixed = Reshape (mixed1, joined)
  made = MatMul (mixed, wo)
  added = Add (made, x)
  y = LayerNormalization <axis = -1> (added, g1, b1)
  up0 = MatMul (y, wu)
  up = Add (up0, bu)
  scaled = Div (up, sqrt2)
  e = Erf (scaled)
  e1 = Add (e, unit)
  gated = Mul (up, e1)
  gelu = Mul (gated, half)
  down = MatMul (gelu, wd)
  last = Add (down, y)
  tokens = LayerNormalization <axis = -1> (last, g2, b2)
  maskt = Unsqueeze (mask, two1)
  masktf = Cast <to = 1> (maskt)
  kept = Mul (tokens, masktf)
  total = ReduceSum <keepdims = 0> (kept, one1)
  count = ReduceSum <keepdims = 0> (masktf, one1)
  pooled = Div (total, count)
}
"""


def write_encoder(path: Path, text: str = MODEL) -> Path:
    """Write the model with weights from a fixed seed."""
    proto = onnx.parser.parse_model(text)
    generator = np.random.default_rng(11)
    shapes = {
        "words": (WORDS, WIDTH),
        "positions": (POSITIONS, WIDTH),
        **dict.fromkeys(("wq", "wk", "wv", "wo"), (WIDTH, WIDTH)),
        "wu": (WIDTH, INNER),
        "bu": (INNER,),
        "wd": (INNER, WIDTH),
    }
    arrays = {n: generator.normal(size=s) * (1 if len(s) == 1 else s[0] ** -0.5) for n, s in shapes.items()}
    arrays |= {f"g{k}": 1 + 0.1 * generator.normal(size=WIDTH) for k in range(3)}
    arrays |= {f"b{k}": 0.1 * generator.normal(size=WIDTH) for k in range(3)}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(proto, path)
    return path


def text_of(length: int, seed: int, hidden: int = 0) -> dict[str, np.ndarray]:
    """Return a text; the mask hides its last words."""
    ids = np.random.default_rng(seed).integers(0, WORDS, (1, length))
    mask = np.ones((1, length), np.int64)
    mask[0, length - hidden :] = 0
    return {"ids": ids, "mask": mask}


def texts() -> list[dict[str, np.ndarray]]:
    """Return texts of many lengths."""
    return [text_of(length, seed) for seed, length in enumerate((6, 9, 12, 14, 21, 12, 30, 17) * 2)]
