"""Walks over an ONNX protobuf that is not trusted yet: bounded, and without copying tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from bitwright.compiler.ingest.limits import Limits
from bitwright.compiler.ingest.text import quoted, refused

Graph = onnx.GraphProto | onnx.FunctionProto


@dataclass(frozen=True)
class Body:
    """A list of nodes with its place in the model.

    Attributes:
        graph: The main graph, the body of a control-flow node, or a model-local function.
        place: ``""`` for the main graph, else e.g. ``"then_branch of node 'if'"``.
        depth: 0 for the main graph and for functions.
        function: The function this is, or is inside of; None in the main graph.
    """

    graph: Graph
    place: str
    depth: int
    function: onnx.FunctionProto | None


def node_part(node: onnx.NodeProto, place: str = "") -> str:
    """Return how messages name a node: by its name, else by its first output."""
    known = f"node {quoted(node.name)}" if node.name else f"node with output {quoted((*node.output, '')[0])}"
    inside = f" in {place}" if place else ""
    return f"{known} ({quoted(node.op_type)[1:-1]}){inside}"


def tensor_part(name: str, place: str = "") -> str:
    """Return how messages name a tensor."""
    return f"tensor {quoted(name)}" + (f" in {place}" if place else "")


def attribute_graphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """Yield the control-flow bodies of a node with the names of their attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def bodies(model: onnx.ModelProto, file: str, limits: Limits) -> list[Body]:
    """List every body of a model, outer before inner.

    Raises:
        ModelError: More nodes, bodies or nesting than the budgets allow.
    """
    fix = "split the model, or unroll and simplify it in the exporter"
    waiting = [Body(f, f"function {quoted(f.name)}", 0, f) for f in reversed(model.functions)]
    waiting.append(Body(model.graph, "", 0, None))
    found: list[Body] = []
    nodes = 0
    while waiting:
        body = waiting.pop()
        found.append(body)
        nodes += len(body.graph.node)
        if nodes > limits.nodes:
            raise refused(file, "", f"more than {limits.nodes} nodes", fix)
        if body.depth > limits.depth:
            raise refused(file, body.place, f"control flow is nested deeper than {limits.depth}", fix)
        for node in body.graph.node:
            for name, graph in attribute_graphs(node):
                place = f"{quoted(name)[1:-1]} of {node_part(node)}"
                waiting.append(Body(graph, place, body.depth + 1, body.function))
                if len(waiting) + len(found) > limits.bodies:
                    raise refused(
                        file, "", f"more than {limits.bodies} control-flow bodies and functions", fix
                    )
    return found


def attribute_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors in the attributes of a node, e.g. the value of a Constant."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors


def body_tensors(body: Body) -> Iterator[tuple[onnx.TensorProto, str]]:
    """Yield every constant tensor of one body with how messages name it."""
    if isinstance(body.graph, onnx.GraphProto):
        for tensor in body.graph.initializer:
            yield tensor, tensor_part(tensor.name, body.place)
    for node in body.graph.node:
        for tensor in attribute_tensors(node):
            yield tensor, node_part(node, body.place)
