"""Attention over a cache of fixed capacity becomes a CachedAttention step."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, int_attribute, node_label, static_shape
from bitwright.compiler.program.draft import Draft, labels
from bitwright.compiler.program.extract_weight_only import CONTRIB
from bitwright.compiler.program.ops import CachedAttention, Tensor

OPERATOR = "GroupQueryAttention"
QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LAST, TOTAL, COS, SIN = range(9)
# What changes the result and has no counterpart in the step.
REFUSED = ("rotary_interleaved", "smooth_softmax", "softcap", "qk_output", "k_quant_type", "v_quant_type")


def match_attention(draft: Draft, node: ir.Node) -> None:
    """GroupQueryAttention of one sequence, with rotation and caches of fixed capacity."""
    problem = _why_not(node)
    if problem is not None:
        draft.note(node, problem)
        return
    cos, sin = (constant_array(node.inputs[k]) for k in (COS, SIN))
    query, past = static_shape(node.inputs[QUERY]), static_shape(node.inputs[PAST_KEY])
    assert query is not None and past is not None and cos is not None and sin is not None
    window = int_attribute(node, "local_window_size", -1)
    step = CachedAttention(
        name=draft.label(node_label(node)),
        inputs=tuple(node.inputs[k].name or "" for k in (QUERY, KEY, VALUE, LAST, PAST_KEY, PAST_VALUE)),  # type: ignore[union-attr]
        outputs=tuple(v.name or "" for v in node.outputs),
        nodes=labels(node),
        heads=int_attribute(node, "num_heads", 0),
        key_heads=past[1],
        width=past[3],
        cos=np.ascontiguousarray(cos),
        sin=np.ascontiguousarray(sin),
        window=window if 0 < window < past[2] else None,
    )
    shapes = (query, past, past)
    draft.add(step, *(Tensor(n, s, "float32") for n, s in zip(step.outputs, shapes, strict=True)))


def _why_not(node: ir.Node) -> str | None:
    """Return why an attention is no CachedAttention, or None."""
    inputs = [*node.inputs, *[None] * (SIN + 1 - len(node.inputs))]
    if node.domain != CONTRIB or len(node.outputs) != 3 or any(v is None for v in inputs[: SIN + 1]):
        return "it has no caches, or no rotation"
    if any(v is not None for v in inputs[SIN + 1 :]):
        return "it has positions, a bias or sinks of its own"
    if any(
        node.attributes.get_float(name, 0.0) if name == "softcap" else _given(node, name) for name in REFUSED
    ):
        return "it has a soft cap, interleaved rotation or quantized caches"
    if int_attribute(node, "do_rotary", 0) != 1:
        return "it does not rotate"
    return _why_shapes(node)


def _given(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and attribute.value not in (0, "NONE", b"NONE")


def _why_shapes(node: ir.Node) -> str | None:
    query, key, value, past, other = (
        static_shape(node.inputs[k]) for k in (QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE)
    )
    cos, sin = (constant_array(node.inputs[k]) for k in (COS, SIN))
    if query is None or key is None or past is None or cos is None or sin is None or cos.ndim != 2:
        return "its shapes or its tables are not constant"
    heads, (batch, key_heads, capacity, width) = int_attribute(node, "num_heads", 0), past
    scale = node.attributes.get_float("scale", 0.0) or 0.0
    fits = (
        batch == query[0] == 1
        and other == past
        and value == key == (1, query[1], key_heads * width)
        and query[2] == heads * width
        and heads % key_heads == 0
        and cos.shape == sin.shape
        and cos.shape[0] >= capacity
        and cos.shape[1] * 2 == width
    )
    if not fits:
        return "its heads, caches and tables have shapes that do not fit one sequence"
    if scale and not np.isclose(scale, width**-0.5, rtol=1e-6):
        return "its scores are scaled by another number than 1 / sqrt(width)"
    return None
