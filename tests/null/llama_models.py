"""Small llama decoders as ONNX models, spelled out as exporters do, with names that say nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
decoder (int64[1, T] ids{inputs}) => (float[1, T, {vocabulary}] scores{outputs})
{{
"""
POSITIONS = """
sizes = Shape(ids)
length = Gather<axis=0>(sizes, one)
last = Unsqueeze(length, zeros)
p = Range(zero, length, one)
rows = Unsqueeze(p, ones)
columns = Unsqueeze(p, zeros)
allowed = LessOrEqual(columns, rows)
mask = Where(allowed, nothing, never)
x0 = Gather<axis=0>(w_embedding, ids)
"""
LOOKED_UP = """
c = Slice(cos_table, zeros, last, zeros)
s = Slice(sin_table, zeros, last, zeros)
"""
COMPUTED = """
pf = Cast<to=1>(rows)
angles = MatMul(pf, frequencies)
twice = Concat<axis=-1>(angles, angles)
c_raw = Cos(twice)
s_raw = Sin(twice)
c = Mul(c_raw, unit)
s = Mul(s_raw, unit)
"""
NORM = """
{to}_q = Mul({x}, {x})
{to}_m = ReduceMean<axes=[-1]>({to}_q)
{to}_e = Add({to}_m, epsilon)
{to}_r = Sqrt({to}_e)
{to}_u = Div({x}, {to}_r)
{to} = Mul({gain}, {to}_u)
"""
HEADS = """
{to}_l = MatMul({x}, {w})
{to}_s = Reshape({to}_l, {shape})
{to} = Transpose<perm=[0, 2, 1, 3]>({to}_s)
"""
ROTATE = """
{x}_1 = Slice({x}, zeros, half, last_axis)
{x}_2 = Slice({x}, half, whole, last_axis)
{x}_n = Neg({x}_2)
{x}_h = Concat<axis=-1>({x}_n, {x}_1)
{x}_c = Mul({x}, c)
{x}_s2 = Mul({x}_h, s)
{x}_rot = Add({x}_c, {x}_s2)
"""
REPEAT = """
{x}_w = Unsqueeze({x}, two)
{x}_e = Expand({x}_w, repeats)
{x}_rep = Reshape({x}_e, repeated)
"""
SCORES = """
kt{n} = Transpose<perm=[0, 1, 3, 2]>({k})
qk{n} = MatMul(q{n}_rot, kt{n})
sc{n} = Mul(qk{n}, scale)
ms{n} = Add(sc{n}, mask)
"""
# As PyTorch writes scaled_dot_product_attention: the root of the scale on both sides, a selection for the mask.
FUSED_SCORES = """
kt{n} = Transpose<perm=[0, 1, 3, 2]>({k})
ks{n} = Mul(kt{n}, root)
qs{n} = Mul(q{n}_rot, root)
qk{n} = MatMul(qs{n}, ks{n})
ms{n} = Where(allowed, qk{n}, never)
"""
# As later versions write it: keys swapped with batch and heads joined, rows that see nothing set to zero.
GUARDED_SCORES = """
kj{n} = Reshape({k}, joined)
k3{n} = Transpose<perm=[0, 2, 1]>(kj{n})
kt{n} = Reshape(k3{n}, apart)
ks{n} = Mul(kt{n}, root)
qs{n} = Mul(q{n}_rot, root)
qk{n} = MatMul(qs{n}, ks{n})
ms{n} = Add(qk{n}, mask)
"""
SHARES = "pr{n} = Softmax<axis=-1>(ms{n})\n"
GUARDED_SHARES = """
sm{n} = Softmax<axis=-1>(ms{n})
bad{n} = IsNaN(sm{n})
pr{n} = Where(bad{n}, nothing, sm{n})
"""
MIX = """
av{n} = MatMul(pr{n}, {v})
at{n} = Transpose<perm=[0, 2, 1, 3]>(av{n})
af{n} = Reshape(at{n}, flat)
o{n} = MatMul(af{n}, w_o{n})
y{n} = Add(x{n}, o{n})
"""
FEED_FORWARD = """
g{n} = MatMul(f{n}, w_g{n})
sg{n} = {activation}(g{n})
ga{n} = Mul(g{n}, sg{n})
up{n} = MatMul(f{n}, w_u{n})
gu{n} = Mul(ga{n}, up{n})
d{n} = MatMul(gu{n}, w_d{n})
x{next} = Add(d{n}, y{n})
"""


@dataclass(frozen=True)
class Sizes:
    """A decoder to build; what differs from a llama decoder is for refusals."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    key_heads: int = 2
    feed_forward: int = 96
    vocabulary: int = 48
    positions: int = 32
    base: float = 10000.0
    epsilon: float = 1e-5
    tied: bool = True
    cache: bool = False
    activation: str = "Sigmoid"
    scale: float | None = None
    rotate_keys: bool = True
    computed_angles: bool = False
    fused_attention: bool = False
    guarded_attention: bool = False
    seed: int = 0

    @property
    def head_width(self) -> int:
        """Elements of a head."""
        return self.width // self.heads


def llama_model(sizes: Sizes | None = None) -> onnx.ModelProto:
    """Return a decoder with random weights."""
    s = sizes or Sizes()
    model = onnx.parser.parse_model(_text(s))
    arrays = {**constant_arrays(s), **weight_arrays(s)}
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    onnx.checker.check_model(model)
    return model


def _text(s: Sizes) -> str:
    past = [f"past_{part}{n}" for n in range(s.layers) for part in "kv"] if s.cache else []
    kind = f"float[1, {s.key_heads}, {{}}, {s.head_width}]"
    inputs = "".join(f", {kind.format('P')} {name}" for name in past)
    outputs = "".join(f", {kind.format('R')} new_{name}" for name in past)
    body = (
        POSITIONS
        + (COMPUTED if s.computed_angles else LOOKED_UP)
        + "".join(layer_text(s, n) for n in range(s.layers))
    )
    body += NORM.format(x=f"x{s.layers}", to="z", gain="g_z")
    body += "scores = MatMul(z, w_head)\n}"
    return HEAD.format(inputs=inputs, outputs=outputs, vocabulary=s.vocabulary) + body


def layer_text(s: Sizes, n: int) -> str:
    """Return the nodes of a layer; they read ``x{n}``, ``mask``, ``c`` and ``s``, and write ``x{n + 1}``."""
    text = NORM.format(x=f"x{n}", to=f"a{n}", gain=f"g_a{n}")
    for part, shape in (("q", "query_shape"), ("k", "key_shape"), ("v", "key_shape")):
        text += HEADS.format(x=f"a{n}", to=f"{part}{n}", w=f"w_{part}{n}", shape=shape)
    text += ROTATE.format(x=f"q{n}") + ROTATE.format(x=f"k{n}")
    keys, values = f"k{n}_rot" if s.rotate_keys else f"k{n}", f"v{n}"
    if s.cache:
        text += f"new_past_k{n} = Concat<axis=2>(past_k{n}, {keys})\n"
        text += f"new_past_v{n} = Concat<axis=2>(past_v{n}, {values})\n"
        keys, values = f"new_past_k{n}", f"new_past_v{n}"
    if s.heads != s.key_heads:
        text += REPEAT.format(x=keys) + REPEAT.format(x=values)
        keys, values = f"{keys}_rep", f"{values}_rep"
    scores = GUARDED_SCORES if s.guarded_attention else FUSED_SCORES if s.fused_attention else SCORES
    text += scores.format(n=n, k=keys)
    text += (GUARDED_SHARES if s.guarded_attention else SHARES).format(n=n)
    text += MIX.format(n=n, v=values)
    text += NORM.format(x=f"y{n}", to=f"f{n}", gain=f"g_f{n}")
    return text + FEED_FORWARD.format(n=n, next=n + 1, activation=s.activation)


def constant_arrays(s: Sizes) -> dict[str, np.ndarray]:
    """Return constants by the names that the texts have for them."""
    powers = s.base ** -(np.arange(0, s.head_width, 2) / s.head_width)
    angles = np.tile(np.arange(s.positions)[:, None] * powers, 2)
    integers = {
        "zeros": [0],
        "ones": [1],
        "two": [2],
        "three": [3],
        "last_axis": [-1],
        "half": [s.head_width // 2],
        "whole": [s.head_width],
        "query_shape": [0, 0, s.heads, s.head_width],
        "key_shape": [0, 0, s.key_heads, s.head_width],
        "flat": [0, 0, s.width],
        "joined": [s.heads, -1, s.head_width],
        "apart": [1, s.heads, s.head_width, -1],
        "repeats": [1, 1, s.heads // s.key_heads, 1, 1],
        "repeated": [0, s.heads, -1, s.head_width],
    }
    scale = s.head_width**-0.5 if s.scale is None else s.scale
    floats = {
        "nothing": 0.0,
        "never": -1e9,
        "epsilon": s.epsilon,
        "scale": scale,
        "root": scale**0.5,
        "unit": 1.0,
    }
    return {
        **{name: np.array(v, np.int64) for name, v in integers.items()},
        **{name: np.array(v, np.int64) for name, v in (("zero", 0), ("one", 1))},
        **{name: np.array(v, np.float32) for name, v in floats.items()},
        "frequencies": powers[None].astype(np.float32),
        "cos_table": np.cos(angles).astype(np.float32),
        "sin_table": np.sin(angles).astype(np.float32),
    }


def weight_arrays(s: Sizes) -> dict[str, np.ndarray]:
    """Return random weights by the names that the texts have for them."""
    random = np.random.default_rng(s.seed)
    keys = s.key_heads * s.head_width
    shapes = {"w_embedding": (s.vocabulary, s.width), "g_z": (s.width,)}
    for n in range(s.layers):
        shapes |= {f"w_q{n}": (s.width, s.width), f"w_k{n}": (s.width, keys), f"w_v{n}": (s.width, keys)}
        shapes |= {f"w_o{n}": (s.width, s.width), f"w_g{n}": (s.width, s.feed_forward)}
        shapes |= {f"w_u{n}": (s.width, s.feed_forward), f"w_d{n}": (s.feed_forward, s.width)}
        shapes |= {f"g_a{n}": (s.width,), f"g_f{n}": (s.width,)}
    found = {k: (random.standard_normal(v) * (v[0] ** -0.5)).astype(np.float32) for k, v in shapes.items()}
    found |= {
        k: (1 + 0.1 * random.standard_normal(v)).astype(np.float32) for k, v in shapes.items() if len(v) == 1
    }
    head = found["w_embedding"].T if s.tied else random.standard_normal((s.width, s.vocabulary)) / 8
    return {**found, "w_head": np.ascontiguousarray(head, np.float32)}
