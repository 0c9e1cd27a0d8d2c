"""Multiply repeated key or value heads once: the queries that share them become rows of one product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, is_op, node_label, static_shape
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, graph_of, replace_node

Shape = tuple[int, ...]
LAST_TWO_SWAPPED = (0, 1, 3, 2)


@dataclass(frozen=True)
class GroupQueries:
    """Rewrite attention that repeats its key and value heads (grouped queries).

    Exporters repeat every head by Unsqueeze, Expand and Reshape, ``[N, H, S, D]`` to ``[N, H * r, S, D]``, before a
    product with ``[N, H * r, T, X]``. The r queries of a head are neighbours there, so they are rows of one product:
    ``[N, H, r * T, X]`` with the heads as they are. A decoder then reads its cache once instead of writing and
    reading r copies of it. Only where all shapes are fixed.
    """

    name: ClassVar[str] = "group_queries"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place; repetitions that nobody reads any more are removed."""
        found = [(n, r) for g in model.graphs() for n in g if is_op(n, "MatMul") and (r := _repeated(n))]
        names = fresh_names(model) if found else None
        for product, repeated in found:
            assert names is not None
            _rewrite(product, repeated, names)
        return PassResult(model, len(found))


@dataclass(frozen=True)
class _Repeated:
    """The heads behind the second operand of a product.

    Attributes:
        heads: [N, H, S, D], not repeated.
        times: r.
        transpose: The node that swaps S and D behind the repetition, or None.
        chain: The nodes of the repetition, last first.
    """

    heads: ir.Value
    times: int
    transpose: ir.Node | None
    chain: tuple[ir.Node, ...]


def _repeated(product: ir.Node) -> _Repeated | None:
    value = product.inputs[1]
    node = None if value is None else value.producer()
    transpose = None
    if node is not None and is_op(node, "Transpose"):
        if tuple(node.attributes.get_ints("perm", ()) or ()) != LAST_TWO_SWAPPED:
            return None
        transpose, node = node, node.inputs[0].producer() if node.inputs[0] is not None else None
    chain: list[ir.Node] = []
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        if node is None or not is_op(node, op_type):
            return None
        chain.append(node)
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    heads = chain[-1].inputs[0]
    times = _times(heads, *(n.outputs[0] for n in reversed(chain)))
    if heads is None or times is None or not _fits(product, chain[0].outputs[0]):
        return None
    return _Repeated(heads, times, transpose, tuple(chain))


def _times(heads: ir.Value | None, unsqueezed: ir.Value, expanded: ir.Value, merged: ir.Value) -> int | None:
    """Return r if each of the heads of [N, H, S, D] is repeated r times, its copies side by side."""
    shapes = [static_shape(v) for v in (heads, unsqueezed, expanded, merged)]
    if any(s is None for s in shapes) or len(shapes[0] or ()) != 4 or len(shapes[2] or ()) != 5:
        return None
    n, h, s, d = shapes[0] or ()
    times = int((shapes[2] or ())[2])
    wanted: list[Shape] = [(n, h, 1, s, d), (n, h, times, s, d), (n, h * times, s, d)]
    return times if times > 1 and shapes[1:] == wanted else None


def _fits(product: ir.Node, repeated: ir.Value) -> bool:
    """Tell whether the first operand has as many heads and no axis is broadcast."""
    queries, heads = static_shape(product.inputs[0]), static_shape(repeated)
    return (
        queries is not None
        and heads is not None
        and len(queries) == 4
        and queries[:2] == heads[:2]
        and static_shape(product.outputs[0]) is not None
        and 0 not in (*queries, *heads)
    )


def _rewrite(product: ir.Node, repeated: _Repeated, names: FreshNames) -> None:
    queries, heads = product.inputs[0], static_shape(repeated.heads)
    shape, result = static_shape(queries), static_shape(product.outputs[0])
    assert queries is not None and heads is not None and shape is not None and result is not None
    label, rows = node_label(product), repeated.times * shape[2]
    new = [_reshape(product, queries, (*heads[:2], rows, shape[3]), names)]
    operand = repeated.heads
    if repeated.transpose is not None:
        swapped = tuple(heads[axis] for axis in LAST_TWO_SWAPPED)
        attributes = {"perm": LAST_TWO_SWAPPED}
        new.append(_described("Transpose", [operand], swapped, names(f"{label}_heads"), attributes))
        operand = new[-1].outputs[0]
    grouped = (*heads[:2], rows, result[3])
    new.append(_described("MatMul", [new[0].outputs[0], operand], grouped, product.name or names(label)))
    new.append(_reshape(product, new[-1].outputs[0], result, names))
    replace_node(product, new, [new[-1].outputs[0]])
    _remove_unread([*([repeated.transpose] if repeated.transpose else []), *repeated.chain])


def _reshape(product: ir.Node, value: ir.Value, shape: Shape, names: FreshNames) -> ir.Node:
    stem = f"{node_label(product)}_grouped"
    target = add_initializer(graph_of(product), names(f"{stem}_shape"), np.array(shape, np.int64))
    return _described("Reshape", [value, target], shape, names(stem))


def _described(
    op_type: str,
    inputs: list[ir.Value],
    shape: Shape,
    name: str,
    attributes: Mapping[str, Shape] | None = None,
) -> ir.Node:
    node = ir.node(op_type, inputs, attributes or {}, name=name)
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{name}_out", inputs[0].type, ir.Shape(shape)
    return node


def _remove_unread(nodes: list[ir.Node]) -> None:
    for node in nodes:
        output = node.outputs[0]
        if output.uses() or output.is_graph_output():
            return
        graph_of(node).remove(node, safe=True)
