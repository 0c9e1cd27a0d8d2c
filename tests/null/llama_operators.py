"""Small llama decoders written with operators for their parts: opset 23, ONNX Runtime's own, and mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx.parser
from llama_models import Sizes, constant_arrays, weight_arrays
from onnx import numpy_helper

HEAD = """
<ir_version: {ir}, opset_import: ["" : {opset}, "com.microsoft" : 1]>
decoder (int64[N, T] ids{inputs}) => (float[N, T, {vocabulary}] scores{outputs})
{{
sizes = Shape(ids)
batch = Slice(sizes, zeros, ones)
length = Slice(sizes, ones, two)
{past}
total = Add(past, length)
first = Squeeze(past)
end = Squeeze(total)
p = Range(first, end, one)
columns = Range(zero, end, one)
rows = Unsqueeze(p, ones)
allowed = LessOrEqual(columns, rows)
some = Concat<axis=0>(ones, length)
p_row = Reshape(p, some)
all = Concat<axis=0>(batch, length)
positions = Expand(p_row, all)
short = Cast<to=6>(total)
less = Sub(short, one_32)
seqlens = Expand(less, batch)
total_32 = Squeeze(short)
c_rows = Gather<axis=0>(cos_half, positions)
s_rows = Gather<axis=0>(sin_half, positions)
shifts = Where(allowed, nothing, never)
shift = Unsqueeze(shifts, first_axes)
x0 = Gather<axis=0>(w_embedding, ids)
"""
NORMS = {
    "RMSNormalization": "{to} = RMSNormalization<axis=-1, epsilon={epsilon}>({x}, {gain})\n",
    "SimplifiedLayerNormalization": (
        "{to} = SimplifiedLayerNormalization<axis=-1, epsilon={epsilon}, stash_type=1>({x}, {gain})\n"
    ),
}
SKIP_NORM = (
    "{to}, {to}_mean, {to}_inverse, {total} = com.microsoft.SkipSimplifiedLayerNormalization<epsilon={epsilon}>"
    "({x}, {skip}, {gain})\n"
)
LAST_SKIP_NORM = (
    "{to} = com.microsoft.SkipSimplifiedLayerNormalization<epsilon={epsilon}>({x}, {skip}, {gain})\n"
)
SPLIT = "{x}_s = Reshape({x}, {shape})\n{x}_h = Transpose<perm=[0, 2, 1, 3]>({x}_s)\n"
JOIN = "{x}_t = Transpose<perm=[0, 2, 1, 3]>({x})\n{x}_j = Reshape({x}_t, {shape})\n"
FEED_FORWARD = """
g{n} = MatMul(f{n}, w_g{n})
sg{n} = Sigmoid(g{n})
ga{n} = Mul(g{n}, sg{n})
up{n} = MatMul(f{n}, w_u{n})
gu{n} = Mul(ga{n}, up{n})
d{n} = MatMul(gu{n}, w_d{n})
"""


@dataclass(frozen=True)
class Spelling:
    """Which operators say what.

    Attributes:
        norm: Operator of the normalizations.
        skip: Residual additions are part of them.
        attention: Operator.
        rotary: Rotated by an operator over heads, or over joined heads, or by the attention itself.
        standard_rotary: The operator is opset 23's, else ONNX Runtime's.
        table: RotaryEmbedding looks positions up by itself.
        heads_first: Attention gets (batch, heads, length, width), else heads joined.
        packed: One product makes queries, keys and values, with a bias; the attention takes them apart.
    """

    norm: Literal["RMSNormalization", "SimplifiedLayerNormalization"] = "RMSNormalization"
    skip: bool = False
    attention: Literal["Attention", "GroupQueryAttention", "MultiHeadAttention"] = "Attention"
    rotary: Literal["heads", "joined", "inside"] = "heads"
    standard_rotary: bool = True
    table: bool = False
    heads_first: bool = True
    packed: bool = False


SPELLINGS: dict[str, Spelling] = {
    "opset 23": Spelling(),
    "opset 23, heads joined": Spelling(rotary="joined", heads_first=False),
    "opset 23, positions looked up": Spelling(table=True),
    "opset 23, rotated heads joined": Spelling(heads_first=False, table=True),
    "group query": Spelling(
        "SimplifiedLayerNormalization", True, "GroupQueryAttention", "joined", False, True, False
    ),
    "group query that rotates": Spelling(
        "SimplifiedLayerNormalization", True, "GroupQueryAttention", "inside", False, True, False
    ),
    "group query of one product": Spelling(
        "SimplifiedLayerNormalization", True, "GroupQueryAttention", "inside", False, True, False, True
    ),
    "group query behind rotated heads": Spelling(
        "RMSNormalization", False, "GroupQueryAttention", "heads", False, True, False
    ),
    "multi-head": Spelling(
        "SimplifiedLayerNormalization", False, "MultiHeadAttention", "joined", False, True, False
    ),
}


def operator_model(spelling: Spelling, sizes: Sizes) -> onnx.ModelProto:
    """Return a decoder with random weights; its function is that of ``llama_model`` with the same sizes."""
    model = onnx.parser.parse_model(_text(spelling, sizes))
    arrays = {**constant_arrays(sizes), **weight_arrays(sizes), **_more_constants(sizes)}
    read = {v for node in model.graph.node for v in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(a, name) for name, a in arrays.items() if name in read
    )
    return model


def _more_constants(s: Sizes) -> dict[str, np.ndarray]:
    powers = s.base ** -(np.arange(0, s.head_width, 2) / s.head_width)
    angles = np.arange(s.positions)[:, None] * powers
    weights = weight_arrays(s)
    return {
        "one_32": np.array([1], np.int32),
        "first_axes": np.array([0, 1], np.int64),
        "cos_half": np.cos(angles).astype(np.float32),
        "sin_half": np.sin(angles).astype(np.float32),
        **{f"w_qkv{n}": np.concatenate([weights[f"w_{p}{n}"] for p in "qkv"], 1) for n in range(s.layers)},
        **{
            f"b_qkv{n}": np.zeros(s.width + 2 * s.key_heads * s.head_width, np.float32)
            for n in range(s.layers)
        },
        "key_flat": np.array([0, 0, s.key_heads * s.head_width], np.int64),
    }


def _text(p: Spelling, s: Sizes) -> str:
    past = [f"past_{part}{n}" for n in range(s.layers) for part in "kv"] if s.cache else []
    kind = f"float[N, {s.key_heads}, {{}}, {s.head_width}]"
    standard = p.norm == "RMSNormalization"
    text = HEAD.format(
        ir=11 if standard else 10,
        opset=23 if standard else 21,
        inputs="".join(f", {kind.format('P')} {name}" for name in past),
        outputs="".join(f", {kind.format('R')} new_{name}" for name in past),
        vocabulary=s.vocabulary,
        past="cached = Shape(past_k0)\npast = Slice(cached, two, three)"
        if s.cache
        else "past = Identity(zeros)",
    )
    text += _norm(p, s, "a0", "x0", "g_a0")
    for n in range(s.layers):
        text += _layer(p, s, n)
    return text + "scores = MatMul(z, w_head)\n}"


def _norm(p: Spelling, s: Sizes, to: str, x: str, gain: str) -> str:
    return NORMS[p.norm].format(to=to, x=x, gain=gain, epsilon=f"{s.epsilon:.10f}")


def _added(
    p: Spelling, s: Sizes, total: str, x: str, skip: str, to: str, gain: str, *, last: bool = False
) -> str:
    """Return the text of an addition and of the normalization behind it."""
    if not p.skip:
        return f"{total} = Add({x}, {skip})\n" + _norm(p, s, to, total, gain)
    form = LAST_SKIP_NORM if last else SKIP_NORM
    return form.format(to=to, total=total, x=x, skip=skip, gain=gain, epsilon=f"{s.epsilon:.10f}")


def _layer(p: Spelling, s: Sizes, n: int) -> str:
    if p.packed:
        text = f"packed_l{n} = MatMul(a{n}, w_qkv{n})\npacked{n} = Add(b_qkv{n}, packed_l{n})\n"
        return text + _rest(p, s, n, _attention(p, s, n, {"q": f"packed{n}", "k": "", "v": ""}))
    text = "".join(f"{part}{n} = MatMul(a{n}, w_{part}{n})\n" for part in "qkv")
    names = {part: f"{part}{n}" for part in "qkv"}
    shapes = {"q": "query_shape", "k": "key_shape", "v": "key_shape"}
    for part in "qk" if p.rotary != "inside" else "":
        if p.rotary == "heads":
            text += SPLIT.format(x=names[part], shape=shapes[part])
            names[part] += "_h"
        text += f"{part}{n}_r = {_rotary(p, s, names[part], part)}\n"
        names[part] = f"{part}{n}_r"
    for part in "qkv":
        apart = p.rotary == "heads" and part != "v"
        if p.heads_first and not apart:
            text += SPLIT.format(x=names[part], shape=shapes[part])
            names[part] += "_h"
        elif apart and not p.heads_first:
            text += JOIN.format(x=names[part], shape="flat" if part == "q" else "key_flat")
            names[part] += "_j"
    return text + _rest(p, s, n, _attention(p, s, n, names))


def _rest(p: Spelling, s: Sizes, n: int, attention: str) -> str:
    text = attention + f"o{n} = MatMul(at{n}, w_o{n})\n"
    text += _added(p, s, f"y{n}", f"x{n}", f"o{n}", f"f{n}", f"g_f{n}")
    last = n + 1 == s.layers
    to, gain = ("z", "g_z") if last else (f"a{n + 1}", f"g_a{n + 1}")
    return text + FEED_FORWARD.format(n=n) + _added(p, s, f"x{n + 1}", f"d{n}", f"y{n}", to, gain, last=last)


def _rotary(p: Spelling, s: Sizes, x: str, part: str) -> str:
    heads = s.heads if part == "q" else s.key_heads
    count = f"<num_heads={heads}>" if p.rotary == "joined" else ""
    if not p.standard_rotary:
        return f"com.microsoft.RotaryEmbedding{count}({x}, positions, cos_half, sin_half)"
    tables = "cos_half, sin_half, positions" if p.table else "c_rows, s_rows"
    return f"RotaryEmbedding{count}({x}, {tables})"


def _attention(p: Spelling, s: Sizes, n: int, names: dict[str, str]) -> str:
    operands = ", ".join(names[part] for part in "qkv")
    past = f"past_k{n}, past_v{n}" if s.cache else ", "
    mixed = f"mixed{n}" if p.heads_first else f"at{n}"
    outputs = f"{mixed}, new_past_k{n}, new_past_v{n}" if s.cache else mixed
    if p.attention == "Attention":
        counts = "" if p.heads_first else f"<q_num_heads={s.heads}, kv_num_heads={s.key_heads}>"
        text = f"{outputs} = Attention{counts}({operands}, allowed, {past})\n"
    elif p.attention == "GroupQueryAttention":
        rotates = p.rotary == "inside"
        counts = f"<num_heads={s.heads}, kv_num_heads={s.key_heads}, do_rotary={int(rotates)}>"
        if not s.cache:
            outputs += f", new_k{n}, new_v{n}"
        tables = ", cos_half, sin_half" if rotates else ""
        text = f"{outputs} = com.microsoft.GroupQueryAttention{counts}({operands}, {past}, seqlens, total_32{tables})\n"
    else:
        text = f"{outputs} = com.microsoft.MultiHeadAttention<num_heads={s.heads}>({operands}, , , shift, {past})\n"
    if not p.heads_first:
        return text
    return text + f"turned{n} = Transpose<perm=[0, 2, 1, 3]>(mixed{n})\nat{n} = Reshape(turned{n}, flat)\n"
