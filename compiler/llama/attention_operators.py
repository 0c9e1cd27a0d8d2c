"""Attention as one operator: opset 23's Attention, ONNX Runtime's GroupQueryAttention and MultiHeadAttention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from bitwright.compiler.graph.model import STANDARD_DOMAINS
from bitwright.compiler.llama.following import CONTRIB, refuse, through


@dataclass(frozen=True, eq=False)
class Fused:
    """An attention operator's operands.

    Attributes:
        node: The operator.
        query, key, value: What it multiplies, (batch, heads, length, width) or (batch, length, heads * width).
        heads: Query heads, or None if the shapes say it.
        key_heads: Key and value heads, or None if the shapes say it.
        scale: Factor of the scores; None is one over the root of the width.
        past: Graph inputs with the keys and values of earlier positions, or None.
        present: What it writes them to, with this call's behind them.
        mask: What is added to the scores or selects among them, or None.
        tables: Cosines and sines that it rotates queries and keys by, or None.
        window: Positions that it lets a position see, its own included; None for all.
    """

    node: ir.Node
    query: ir.Value | None
    key: ir.Value | None
    value: ir.Value | None
    heads: int | None
    key_heads: int | None
    scale: float | None
    past: tuple[ir.Value | None, ir.Value | None]
    present: tuple[ir.Value | None, ir.Value | None]
    mask: ir.Value | None
    tables: tuple[ir.Value, ir.Value] | None = None
    window: int | None = None


def fused_attention(value: ir.Value | None) -> Fused | None:
    """Return the attention operator that makes a value, or None.

    Raises:
        ModelError: It is one, but does what llama's attention does not.
    """
    node = None if value is None else value.producer()
    if node is None or node.outputs[0] is not value:
        return None
    if node.domain in STANDARD_DOMAINS and node.op_type == "Attention":
        return _standard(node)
    if node.domain == CONTRIB and node.op_type == "GroupQueryAttention":
        return _grouped(node)
    if node.domain == CONTRIB and node.op_type == "MultiHeadAttention":
        return _multi_head(node)
    return None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _output(node: ir.Node, index: int) -> ir.Value | None:
    return node.outputs[index] if len(node.outputs) > index else None


def _past(node: ir.Node, key: int, value: int) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the caches if both are graph inputs."""
    found = through(_input(node, key), "Cast"), through(_input(node, value), "Cast")
    fed = all(v is not None and v.is_graph_input() for v in found)
    if not fed and any(v is not None for v in found):
        refuse("a cache that is a graph input", node.outputs[0])
    return found if fed else (None, None)


def _check_plain(node: ir.Node, unused: tuple[int, ...], **neutral: float) -> None:
    """Refuse operands and attributes that llama's attention does not have.

    Args:
        node: The operator.
        unused: Operands that must be missing.
        neutral: The values at which attributes change nothing.
    """
    given = next((i for i in unused if _input(node, i) is not None), None)
    if given is not None:
        refuse(f"attention without operand {given}", node.outputs[0])
    for name, wanted in neutral.items():
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value != wanted:
            refuse(f"attention with {name} {wanted}", node.outputs[0])


def _standard(node: ir.Node) -> Fused:
    _check_plain(node, (6,), softcap=0.0)
    heads, key_heads = _count(node, "q_num_heads"), _count(node, "kv_num_heads")
    return _read(node, heads, key_heads, past=(4, 5), mask=3)


def _grouped(node: ir.Node) -> Fused:
    _check_plain(
        node,
        (11, 12, 13, 14, 15),
        softcap=0.0,
        rotary_interleaved=0,
        smooth_softmax=0,
        causal=1,
        kv_cache_bit_width=0,
        sliding_window_cache=0,
    )
    cos, sin = _input(node, 7), _input(node, 8)
    found = _read(node, _count(node, "num_heads"), _count(node, "kv_num_heads"), past=(3, 4), mask=10)
    window = node.attributes.get_int("local_window_size", -1)
    if window > 0:
        found = replace(found, window=window)
    if node.attributes.get_int("do_rotary", 0) == 0:
        return found
    if cos is None or sin is None:
        refuse("tables of cosines and sines", node.outputs[0])
    return replace(found, tables=(cos, sin))


def _multi_head(node: ir.Node) -> Fused:
    _check_plain(node, (3, 8, 9))
    heads = _count(node, "num_heads")
    return _read(node, heads, heads, past=(6, 7), mask=5)


def _count(node: ir.Node, attribute: str) -> int | None:
    return node.attributes.get_int(attribute, 0) or None


def _read(
    node: ir.Node, heads: int | None, key_heads: int | None, *, past: tuple[int, int], mask: int
) -> Fused:
    """Return the operands whose places and meaning the operators share."""
    return Fused(
        node=node,
        query=_input(node, 0),
        key=_input(node, 1),
        value=_input(node, 2),
        heads=heads,
        key_heads=key_heads,
        scale=node.attributes.get_float("scale", 0.0) or None,
        past=_past(node, *past),
        present=(_output(node, 1), _output(node, 2)),
        mask=_input(node, mask),
    )
