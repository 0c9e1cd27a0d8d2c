"""Rules on how values connect nodes: defined once, before use, in every body. Also puts names in order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import count

import onnx

from bitwright.compiler.ingest.protos import Body, Graph, attribute_graphs, node_part, tensor_part
from bitwright.compiler.ingest.text import quoted, refused


def _input_names(graph: Graph) -> list[str]:
    return [i if isinstance(i, str) else i.name for i in graph.input]


def _output_names(graph: Graph) -> list[str]:
    return [o if isinstance(o, str) else o.name for o in graph.output]


def _definitions(graph: Graph) -> Iterator[tuple[str, str]]:
    """Yield (value name, who defines it); the default of a graph input defines nothing new."""
    inputs = _input_names(graph)
    yield from ((name, "a graph input") for name in inputs)
    if isinstance(graph, onnx.GraphProto):
        taken = set(inputs)
        yield from ((t.name, "an initializer") for t in graph.initializer if t.name not in taken)
    for node in graph.node:
        yield from ((name, node_part(node)) for name in node.output if name)


def check_unique_initializers(body: Body, file: str) -> None:
    """Refuse two initializers of one name: runtimes disagree on which of them wins.

    Raises:
        ModelError: Names the tensor.
    """
    if not isinstance(body.graph, onnx.GraphProto):
        return
    seen: set[str] = set()
    for tensor in body.graph.initializer:
        if not tensor.name:
            raise refused(file, body.place, "an initializer has no name", "name it, or remove it")
        if tensor.name in seen:
            part = tensor_part(tensor.name, body.place)
            raise refused(file, part, "two initializers have this name", "rename or remove one of them")
        seen.add(tensor.name)


def check_single_assignment(body: Body, file: str) -> None:
    """Refuse a value that is defined twice in one body.

    Raises:
        ModelError: Names the tensor and both definitions.
    """
    first: dict[str, str] = {}
    for name, source in _definitions(body.graph):
        if name in first:
            what = f"defined twice: by {first[name]} and by {source}"
            raise refused(file, tensor_part(name, body.place), what, "give the second one another name")
        first[name] = source


def _reads(node: onnx.NodeProto) -> set[str]:
    """Return the values a node needs: its inputs, and what its bodies capture."""
    needed = {name for name in node.input if name}
    for _, graph in attribute_graphs(node):
        inner = {name for name, _ in _definitions(graph)}
        for child in graph.node:
            needed |= _reads(child) - inner
        needed |= set(_output_names(graph)) - inner
    return needed


def check_connections(graph: Graph, file: str, place: str = "", outer: tuple[set[str], ...] = ()) -> int:
    """Check that every value that is read exists, and put nodes into topological order where they are not.

    Args:
        graph: Body to check, edited in place; the bodies of its nodes are checked too.
        file: Model file, for messages.
        place: Where the body is, for messages.
        outer: Values that the enclosing bodies define, one set a body.

    Returns:
        The number of bodies whose nodes had to be reordered.

    Raises:
        ModelError: A value that nothing defines, or a cycle.
    """
    visible = (*outer, {name for name, _ in _definitions(graph)})
    reordered = 0
    for node in graph.node:
        for name in node.input:
            if name and not any(name in names for names in visible):
                what = f"reads {quoted(name)}, which nothing defines"
                raise refused(
                    file, node_part(node, place), what, "export the model again, or connect that input"
                )
        for attribute, inner in attribute_graphs(node):
            inner_place = f"{quoted(attribute)[1:-1]} of {node_part(node)}"
            reordered += check_connections(inner, file, inner_place, visible)
    _check_outputs(graph, file, place, visible)
    return reordered + _sort(graph, file, place)


def _check_outputs(graph: Graph, file: str, place: str, visible: tuple[set[str], ...]) -> None:
    counts = Counter(_output_names(graph))
    for name in counts:
        if not any(name in names for names in visible):
            part = f"output {quoted(name)}" + (f" of {place}" if place else "")
            raise refused(
                file, part, "nothing defines this output", "remove it, or name the node output it means"
            )
    doubled = next((name for name, n in counts.items() if n > 1), None)
    if doubled is not None:
        part = f"output {quoted(doubled)}" + (f" of {place}" if place else "")
        raise refused(file, part, "listed as an output twice", "list it once")


def _sort(graph: Graph, file: str, place: str) -> int:
    producer = {name: k for k, node in enumerate(graph.node) for name in node.output if name}
    edges = [(producer[n], k) for k, node in enumerate(graph.node) for n in _reads(node) if n in producer]
    if all(source < target for source, target in edges):
        return 0
    import networkx as nx  # takes 0.1 s, and nearly every model is sorted

    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(len(graph.node)))
    order.add_edges_from(edges)
    if not nx.is_directed_acyclic_graph(order):
        loop = sorted({k for edge in nx.find_cycle(order) for k in edge[:2]})
        names = ", ".join(quoted(graph.node[k].name) for k in loop[:4])
        what = f"is on a cycle of {len(loop)} nodes ({names}): its input depends on its own output"
        raise refused(
            file, node_part(graph.node[loop[0]], place), what, "break the cycle; use Loop for iteration"
        )
    nodes = [graph.node[k] for k in nx.lexicographical_topological_sort(order)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return 1


def name_nodes(found: list[Body]) -> None:
    """Give every node a name of its own, in place.

    Equal node names are legal ONNX, but reports, plans and ONNX Runtime need unique ones. The first node of a
    name keeps it, later ones get ``_2``, ``_3``, ...; unnamed ones become e.g. ``Conv_3`` after their
    position.
    """
    taken = {node.name for body in found for node in body.graph.node if node.name}
    uses: Counter[str] = Counter()
    for body in found:
        for position, node in enumerate(body.graph.node):
            stem = node.name or f"{node.op_type}_{position}"
            if not node.name and stem not in taken:
                node.name = stem
            elif not node.name or uses[stem]:
                numbers = count(max(2, uses[stem] + 1))
                number = next(k for k in numbers if f"{stem}_{k}" not in taken)
                node.name, uses[stem] = f"{stem}_{number}", number
            else:
                uses[stem] = 1
            taken.add(node.name)
