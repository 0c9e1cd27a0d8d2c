"""The few graph edits that every rewrite is made of; all of them respect subgraphs and graph outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, constant_array, only_consumer


def fresh_names(model: ir.Model) -> FreshNames:
    """Return a name source that avoids the names of the main graph and of every subgraph."""
    names = FreshNames(model)
    for graph in model.graphs():
        for value in [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]:
            if graph is not model.graph and value.name:
                names(value.name)
    return names


def frozen_array(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of a constant that no caller can override, else None."""
    if value is None or value.is_graph_input():
        return None
    return constant_array(value)


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register ``array`` as initializer ``name`` (which must be free) of ``graph`` and return its value."""
    tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def set_input(node: ir.Node, index: int, value: ir.Value | None) -> None:
    """Connect input ``index`` of ``node``, growing the input list where the optional input was left out."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph that ``node`` is in (functions are inlined before any rewrite runs)."""
    graph = node.graph
    assert isinstance(graph, ir.Graph), "a rewrite met a node outside a graph"
    return graph


def only_local_consumer(value: ir.Value) -> ir.Node | None:
    """Return the single reader of ``value`` if it is in the same graph as the producer, else None."""
    reader, producer = only_consumer(value), value.producer()
    return reader if reader is not None and producer is not None and reader.graph is producer.graph else None


def bypass(old: ir.Value, new: ir.Value) -> bool:
    """Make all readers of ``old`` read ``new`` and remove the node that made ``old``.

    Returns:
        False, with the graph untouched, where ``old`` is a graph output that ``new`` cannot become: ``new``
        is an input, an initializer, already another output, or comes from an outer graph.
    """
    node = old.producer()
    assert node is not None, "only computed values can be bypassed"
    if old.is_graph_output():
        source = new.producer()
        if source is None or source.graph is not node.graph or new.is_graph_output():
            return False
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph_of(node).remove(node, safe=True)
        new.name = name
    else:
        old.replace_all_uses_with(new)
        graph_of(node).remove(node, safe=True)
    describe(new, new.type or old.type, more_precise(new.shape, old.shape))
    return True


def replace_node(old: ir.Node, new: list[ir.Node], outputs: list[ir.Value]) -> None:
    """Put ``new`` in the place of ``old``; its outputs' names, types and shapes pass to ``outputs``."""
    for before, after in zip(old.outputs, outputs, strict=True):
        describe(after, before.type or after.type, more_precise(after.shape, before.shape))
    ir.convenience.replace_nodes_and_values(graph_of(old), old, [old], new, list(old.outputs), outputs)


def describe(value: ir.Value, type_: ir.TypeProtocol | None, shape: ir.Shape | None) -> None:
    """Set type and shape of a value, where known."""
    value.type = type_
    value.shape = shape


def more_precise(known: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    """Join two descriptions of a shape: integer beats symbol, symbol beats nothing, ``known`` wins ties."""
    if known is None or other is None or len(known) != len(other):
        return other if known is None else known
    return ir.Shape([_join(a, b) for a, b in zip(known, other, strict=True)])


def _join(known: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    if isinstance(known, int):
        return known
    return other if isinstance(other, int) or known.value is None else known


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let all readers of ``old``, graph outputs included, read ``new`` under the same name, type and shape."""
    describe(new, old.type, old.shape)
    name = old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    old.name, new.name = None, name
