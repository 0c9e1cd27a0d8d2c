"""Cutting nodes out of a graph into a model of their own, and joining such models again."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from bitwright.compiler.graph.model import is_op, subgraphs

# Deterministic operators that are copied into every part that needs their constant result.
COPIED = ("Constant", "ConstantOfShape", "DequantizeLinear", "QuantizeLinear", "Identity", "Cast", "Reshape")
COPIED_MOVES = ("Transpose", "Squeeze", "Unsqueeze")


def read_values(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    """Return the values of ``graph`` that a node reads, those captured by its subgraphs included, each once."""
    found = [v for v in node.inputs if v is not None]
    for body in subgraphs(node):
        inner = list(ir.traversal.RecursiveGraphIterator(body))
        bodies = [body, *(b for n in inner for b in subgraphs(n))]
        captured = [v for n in inner for v in n.inputs] + [v for b in bodies for v in b.outputs]
        found.extend(v for v in captured if v is not None and v.graph is graph)
    return list(dict.fromkeys(found))


def copied_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that compute constants by cheap deterministic operators."""
    found: set[ir.Node] = set()
    for node in graph:
        reads = [v for v in node.inputs if v is not None]
        if is_op(node, *COPIED, *COPIED_MOVES) and all(
            v.is_initializer() or v.producer() in found for v in reads
        ):
            found.add(node)
    return found


def _with_copied(own: Sequence[ir.Node], copied: set[ir.Node], graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes and all constant-computing nodes that they read."""
    nodes, pending = set(own), list(own)
    while pending:
        for value in read_values(pending.pop(), graph):
            producer = value.producer()
            if producer is not None and producer in copied and producer not in nodes:
                nodes.add(producer)
                pending.append(producer)
    return nodes


def cut_model(
    source: ir.Model,
    own: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    copied: set[ir.Node],
) -> ir.Model:
    """Return a self-contained copy of some nodes; weights are shared with ``source``.

    Args:
        source: The model that holds the nodes.
        own: Nodes of its main graph.
        inputs: What they read and neither they nor ``copied`` nodes compute.
        outputs: What others need of them.
        copied: From :func:`copied_nodes`; those that are read come along.
    """
    graph = source.graph
    wanted = _with_copied(own, copied, graph)
    nodes = [n for n in graph if n in wanted]
    reads = [v for n in nodes for v in read_values(n, graph)]
    view = ir.GraphView(
        inputs,
        outputs,
        nodes=nodes,
        initializers=list(dict.fromkeys(v for v in reads if v.is_initializer())),
        opset_imports=dict(graph.opset_imports),
        name="float_island",
    )
    functions = [f.clone() for f in source.functions.values()]
    return ir.Model(view.clone(), ir_version=source.ir_version, functions=functions)


def join_models(models: Sequence[ir.Model]) -> ir.Model:
    """Return one model that computes what several do.

    Args:
        models: At least one; cut from one model, so that equal names mean equal values. None reads what
            another computes, except for constants that each computes itself. They are not changed.
    """
    joined, *others = [model.clone() for model in models]
    graph = joined.graph
    for other in others:
        known = {v.name: v for v in (*graph.inputs, *graph.initializers.values())}
        known |= {v.name: v for n in graph for v in n.outputs}
        _move_into(graph, other.graph, known)
    return joined


def _move_into(graph: ir.Graph, other: ir.Graph, known: dict[str | None, ir.Value]) -> None:
    """Append the nodes, inputs, initializers and outputs of ``other``; it is empty afterwards."""
    inputs, initializers, outputs = list(other.inputs), list(other.initializers.values()), list(other.outputs)
    nodes = list(other)
    computed = [v for n in nodes for v in n.outputs]
    twins = {v: known[v.name] for v in (*inputs, *initializers, *computed) if v.name and v.name in known}
    ir.convenience.replace_all_uses_with(list(twins), list(twins.values()), replace_graph_outputs=True)
    for values in (other.outputs, other.inputs, other.initializers):
        values.clear()
    other.remove(nodes)
    graph.inputs.extend(v for v in inputs if v not in twins)
    for value in initializers:
        if value not in twins:
            graph.initializers.add(value)
    graph.extend(n for n in nodes if not any(v in twins for v in n.outputs))
    wanted = dict.fromkeys(twins.get(v, v) for v in outputs)
    graph.outputs.extend(v for v in wanted if v not in graph.outputs)
