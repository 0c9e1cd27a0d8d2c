"""Small typed questions about an ``onnx_ir`` model that every phase asks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import onnx_ir as ir

STANDARD_DOMAINS = ("", "ai.onnx")


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Tell whether ``node`` is one of the named operators of the standard ONNX domain."""
    return node is not None and node.domain in STANDARD_DOMAINS and node.op_type in op_types


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of an initializer or of a ``Constant`` node's output, or None if it is computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if is_op(node, "Constant") and node is not None:
        tensor = node.attributes.get_tensor("value", None)
        return None if tensor is None else tensor.numpy()
    return None


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape if every dimension is a known integer, else None."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(d) for d in value.shape.numpy())


def rank(value: ir.Value | None) -> int | None:
    """Return the number of dimensions if it is known."""
    return None if value is None or value.shape is None else len(value.shape)


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """Return the element type if it is known."""
    return None if value is None else value.dtype


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute or its default."""
    return node.attributes.get_int(name, default)


def ints_attribute(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return a list-of-integers attribute or its default."""
    found = node.attributes.get_ints(name, None)
    return default if found is None else tuple(found)


def consumers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read ``value``, each once, in no particular order."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def only_consumer(value: ir.Value) -> ir.Node | None:
    """Return the single node that reads ``value``; None if there are others or it is a graph output."""
    if value.is_graph_output():
        return None
    found = consumers(value)
    return found[0] if len(found) == 1 else None


def node_label(node: ir.Node) -> str:
    """Return the name a user knows the node by: its own, else operator and first output."""
    if node.name:
        return node.name
    return f"{node.op_type}({node.outputs[0].name if node.outputs else ''})"


def value_names(model: ir.Model) -> set[str]:
    """Return every value name of the main graph."""
    graph = model.graph
    names = {v.name for v in graph.inputs} | set(graph.initializers)
    names |= {o.name for n in graph for o in n.outputs}
    return {n for n in names if n}


class FreshNames:
    """Hands out value or node names that the model does not use yet."""

    def __init__(self, model: ir.Model) -> None:
        self._taken = value_names(model) | {n.name for n in model.graph if n.name}

    def __call__(self, stem: str) -> str:
        """Return ``stem`` or ``stem_2``, ``stem_3``, ... whichever is free first, and reserve it."""
        name = next(n for k in count(1) if (n := stem if k == 1 else f"{stem}_{k}") not in self._taken)
        self._taken.add(name)
        return name


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the bodies of a control-flow node."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
