"""Take apart the one product that makes queries, keys and values of a GroupQueryAttention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, is_op, node_label
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import (
    add_initializer,
    fresh_names,
    frozen_array,
    graph_of,
    only_local_consumer,
)

DOMAIN, OPERATOR = "com.microsoft", "GroupQueryAttention"
QUERY, KEY, VALUE = range(3)
PARTS = ("query", "key", "value")


@dataclass(frozen=True)
class SplitPackedAttention:
    """``GroupQueryAttention(x W)`` becomes ``GroupQueryAttention(x Wq, x Wk, x Wv)``.

    ONNX Runtime's model builder joins the three matrices of a layer, with their biases. Apart, each can have a format
    and an error of its own, and a decoder's parts are where they are looked for. Every result stays the same sum.
    """

    name: ClassVar[str] = "split_packed_attention"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        packed = [(node, found) for node in model.graph if (found := _packed(node)) is not None]
        names = fresh_names(model) if packed else None
        for node, found in packed:
            assert names is not None
            _split(node, found, names)
        return PassResult(model, len(packed))


@dataclass(frozen=True)
class _Packed:
    """The product in front of an attention.

    Attributes:
        product: MatMul with a constant matrix.
        addition: Add of a constant vector behind it, or None.
        matrix: Shape (inputs, outputs).
        bias: Shape (outputs,), or None.
        bounds: Where the columns of queries end, and those of keys.
    """

    product: ir.Node
    addition: ir.Node | None
    matrix: np.ndarray
    bias: np.ndarray | None
    bounds: tuple[int, int]


def _packed(node: ir.Node) -> _Packed | None:
    if node.domain != DOMAIN or node.op_type != OPERATOR or len(node.inputs) <= VALUE:
        return None
    if node.inputs[KEY] is not None or node.inputs[VALUE] is not None:
        return None
    addition, bias, value = None, None, node.inputs[QUERY]
    producer = _only_producer(value)
    if producer is not None and is_op(producer, "Add"):
        addition, bias, value = _with_bias(producer)
        producer = _only_producer(value)
    matrix = frozen_array(producer.inputs[1]) if producer is not None and is_op(producer, "MatMul") else None
    heads, key_heads = (node.attributes.get_int(a, 0) for a in ("num_heads", "kv_num_heads"))
    all_heads = heads + 2 * key_heads
    if producer is None or matrix is None or matrix.ndim != 2 or min(heads, key_heads) < 1:
        return None
    if matrix.shape[1] % all_heads or (bias is not None and bias.shape != matrix.shape[1:]):
        return None
    width = matrix.shape[1] // all_heads
    return _Packed(producer, addition, matrix, bias, (heads * width, (heads + key_heads) * width))


def _only_producer(value: ir.Value | None) -> ir.Node | None:
    """Return the node that makes a value for one reader."""
    node = None if value is None else value.producer()
    return node if node is not None and value is not None and only_local_consumer(value) else None


def _with_bias(node: ir.Node) -> tuple[ir.Node | None, np.ndarray | None, ir.Value | None]:
    """Return an addition of a constant, the constant and the other operand; None thrice if it is none."""
    for data, constant in (node.inputs, node.inputs[::-1]):
        bias = frozen_array(constant)
        if bias is not None and bias.ndim == 1:
            return node, bias, data
    return None, None, None


def _split(node: ir.Node, packed: _Packed, names: FreshNames) -> None:
    graph, x = graph_of(node), packed.product.inputs[0]
    matrices = np.split(packed.matrix, packed.bounds, axis=1)
    biases = [None] * len(PARTS) if packed.bias is None else np.split(packed.bias, packed.bounds)
    for index, (part, matrix, bias) in enumerate(zip(PARTS, matrices, biases, strict=True)):
        stem = names(f"{node_label(packed.product)}_{part}")
        made = ir.node("MatMul", [x, add_initializer(graph, names(f"{stem}_weight"), matrix)], name=stem)
        new = [made]
        if bias is not None:
            vector = add_initializer(graph, names(f"{stem}_bias"), bias)
            new.append(ir.node("Add", [made.outputs[0], vector], name=names(f"{stem}_biased")))
        for step in new:
            _describe(step.outputs[0], packed.product.outputs[0], matrix.shape[1], names(f"{step.name}_out"))
        graph.insert_before(packed.addition or packed.product, new)
        node.replace_input_with(index, new[-1].outputs[0])
    for old in (packed.addition, packed.product):
        if old is not None:
            graph.remove(old, safe=True)


def _describe(value: ir.Value, packed: ir.Value, outputs: int, name: str) -> None:
    value.name, value.type = name, packed.type
    if packed.shape is not None:
        value.shape = ir.Shape([*list(packed.shape)[:-1], outputs])
