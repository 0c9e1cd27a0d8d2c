"""Compute queries, keys and values by one product, which fused attention reads packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, constant_array, consumers, is_op
from bitwright.passes.compact_weights import lowest_of_three_bits
from bitwright.passes.contract import PassResult
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.rewriting import add_initializer, fresh_names, graph_of, set_input

DOMAIN = "com.microsoft"
PARTS = 3


@dataclass(frozen=True)
class JoinAttentionInputs:
    """Put the weights of the three linear layers in front of a GroupQueryAttention side by side.

    Every column keeps its own weights and scales, so the numbers stay the same; two calls a layer and the reading of
    the layer's input are saved, which is what counts for a single token. Where the three differ in format, or their
    results have other readers, they stay apart.
    """

    name: ClassVar[str] = "join_attention_inputs"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        joiner = _Joiner(model.graph, fresh_names(model))
        nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type == "GroupQueryAttention"]
        changed = sum(joiner.rewrite(n) for n in nodes)
        if changed:
            RemoveUnused().run(model)
        return PassResult(model, changed)


class _Joiner:
    def __init__(self, graph: ir.Graph, names: FreshNames) -> None:
        self._graph, self._names = graph, names

    def rewrite(self, node: ir.Node) -> bool:
        """Join what one attention reads, if it can be."""
        parts = [v for v in node.inputs[:PARTS] if v is not None]
        if len(parts) < PARTS or not all(_read_by_it_alone(v, node) for v in parts):
            return False
        joined = self._joined(parts)
        if joined is None:
            return False
        joined.name, joined.type = self._names(f"{parts[0].name}_joined"), parts[0].type
        joined.shape = _packed_shape(parts)
        for size in _size_readers(parts[0]):
            size.replace_input_with(0, joined)
        node.replace_input_with(0, joined)
        for index in range(1, PARTS):
            set_input(node, index, None)
        return True

    def _joined(self, parts: Sequence[ir.Value]) -> ir.Value | None:
        """Return the values side by side, computed by the operators that made them one by one; None if they differ."""
        nodes = [n for v in parts if (n := v.producer()) is not None]
        if len(nodes) < PARTS or len({(n.domain, n.op_type, len(n.inputs)) for n in nodes}) > 1:
            return None
        first = nodes[0]
        if is_op(first, "Cast"):
            return self._converted(nodes)
        if is_op(first, "Add"):
            return self._added(nodes)
        if any(n.inputs[0] is not first.inputs[0] for n in nodes) or first.inputs[0] is None:
            return None
        if is_op(first, "MatMul"):
            weight = self._weight([n.inputs[1] for n in nodes])
            return None if weight is None else self._op(first, [first.inputs[0], weight])
        if first.domain == DOMAIN and first.op_type == "MatMulNBits":
            return self._packed(nodes)
        return None

    def _converted(self, nodes: list[ir.Node]) -> ir.Value | None:
        """Join what is converted, and convert it at once."""
        sources = [v for n in nodes if (v := n.inputs[0]) is not None]
        if len({_kind(n) for n in nodes}) > 1:
            return None
        inner = self._joined(sources)
        if inner is None:
            return None
        inner.name = self._names(f"{nodes[0].name}_source")
        inner.type, inner.shape = sources[0].type, _packed_shape(sources)
        for size in _size_readers(sources[0]):
            size.replace_input_with(0, inner)
        return self._op(nodes[0], [inner])

    def _added(self, nodes: list[ir.Node]) -> ir.Value | None:
        """Join biases, and what they are added to."""
        for index in (0, 1):
            biases, rest = [n.inputs[index] for n in nodes], [n.inputs[1 - index] for n in nodes]
            if all(a is not None and a.ndim == 1 for a in map(constant_array, biases)):
                products = self._joined([v for v in rest if v is not None])
                if products is None:
                    return None
                products.name = self._names(f"{nodes[0].name}_product")
                return self._op(nodes[0], [products, self._side_by_side(biases, 0)])
        return None

    def _weight(self, weights: Sequence[ir.Value | None]) -> ir.Value | None:
        """Join the columns of float weights, or of integers in front of a DequantizeLinear."""
        if all(_is_matrix(v) for v in weights):
            return self._side_by_side(weights, 1)
        nodes = [
            n
            for v in weights
            if v is not None and is_op(n := v.producer(), "DequantizeLinear") and n is not None
        ]
        if len(nodes) < PARTS or len({_kind(n) for n in nodes}) > 1 or not all(_by_columns(n) for n in nodes):
            return None
        operands = [self._side_by_side([n.inputs[k] for n in nodes], -1) for k in range(len(nodes[0].inputs))]
        widened = self._op(nodes[0], operands)
        widened.name = self._names(f"{weights[0].name if weights[0] is not None else 'weight'}_joined")
        return widened

    def _packed(self, nodes: list[ir.Node]) -> ir.Value | None:
        """Join the rows of packed weights: one for each column of the product."""
        first = nodes[0]
        if len({_kind(n, but="N") for n in nodes}) > 1:
            return None
        rows = [[n.inputs[k] for n in nodes] for k in range(1, len(first.inputs))]
        if any(v is not None and constant_array(v) is None for values in rows for v in values):
            return None
        if len({lowest_of_three_bits(n) for n in nodes}) > 1:  # beside 4 bits, 3 would take 4 in the file
            return None
        # Which operands are left out is part of what was compared.
        joined = [None if values[0] is None else self._side_by_side(values, 0) for values in rows]
        operands: list[ir.Value | None] = [first.inputs[0], *joined]
        columns = sum(n.attributes.get_int("N", 0) for n in nodes)
        result = self._op(first, operands)
        node = result.producer()
        assert node is not None, "it was made a moment ago"
        node.attributes["N"] = ir.AttrInt64("N", columns)
        return result

    def _side_by_side(self, values: Sequence[ir.Value | None], axis: int) -> ir.Value:
        arrays = [a for v in values if (a := constant_array(v)) is not None]
        name = values[0].name if values[0] is not None else None
        return add_initializer(
            self._graph, self._names(f"{name or 'weight'}_joined"), np.concatenate(arrays, axis)
        )

    def _op(self, like: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Return the result of an operator like another, put in front of that."""
        node = ir.node(
            like.op_type,
            inputs,
            dict(like.attributes),
            domain=like.domain,
            name=self._names(f"{like.name}_joined"),
            num_outputs=1,
        )
        graph_of(like).insert_before(like, node)
        return node.outputs[0]


def _read_by_it_alone(value: ir.Value, node: ir.Node) -> bool:
    """Tell whether only the attention reads a value; its first two sizes, which stay, may be read, too."""
    readers = {n for n in consumers(value) if n is not node}
    return not value.is_graph_output() and readers <= set(_size_readers(value))


def _size_readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read the first two sizes of a value: batch and length, which joining does not change."""
    return [n for n in consumers(value) if is_op(n, "Shape") and n.attributes.get_int("end", 0) == 2]


def _is_matrix(value: ir.Value | None) -> bool:
    array = constant_array(value)
    return array is not None and array.ndim == 2


def _kind(node: ir.Node, but: str = "") -> tuple[object, ...]:
    """Return what must be equal for two operators to be one: attributes and the types of the operands."""
    attributes = sorted((k, str(a.value)) for k, a in node.attributes.items() if k != but)
    operands = [(v is not None, None if v is None else v.dtype) for v in node.inputs]
    return (*attributes, *operands)


def _by_columns(node: ir.Node) -> bool:
    """Tell whether every column of a dequantized matrix has scales of its own, in blocks or one."""
    arrays = [constant_array(v) for v in node.inputs]
    if any(a is None for a in arrays) or arrays[0] is None or arrays[0].ndim != 2:
        return False
    blocked = node.attributes.get_int("block_size", 0) > 0
    axis = node.attributes.get_int("axis", 1)
    wanted = 2 if blocked else 1
    return axis in ((0, -2) if blocked else (1, -1)) and all(
        a is not None and a.ndim == wanted for a in arrays[1:]
    )


def _packed_shape(parts: Sequence[ir.Value]) -> ir.Shape | None:
    known = [v.shape for v in parts if v.shape is not None and isinstance(v.shape[-1], int)]
    if len(known) < PARTS:
        return None
    widths = [s[-1] for s in known]
    return ir.Shape([*known[0][:-1], sum(w for w in widths if isinstance(w, int))])
