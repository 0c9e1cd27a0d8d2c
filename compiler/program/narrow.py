"""Cutting a float island that cannot be lowered around the nodes that are to blame."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count

import networkx as nx
import onnx_ir as ir

from bitwright.compiler.graph.model import is_op, node_label, static_shape
from bitwright.compiler.program.cut import copied_nodes, cut_model, read_values
from bitwright.compiler.program.draft import labels
from bitwright.compiler.program.ops import FloatIsland

WhyNot = Callable[[FloatIsland], str | None]
Edges = Sequence[tuple[ir.Node, ir.Node]]

# They move or convert values: no reason to leave ONNX Runtime, nor to enter the library before it.
COMING_ALONG = (
    *("Cast", "Concat", "DequantizeLinear", "Expand", "Flatten", "Identity", "QuantizeLinear", "Reshape"),
    *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
)


def raised(base: int, odd: bool) -> int:
    """Return the smallest level that is odd, or even, and at least ``base``."""
    return base + (base % 2 != odd)


def narrowed(
    island: FloatIsland, reason: str, why_not: WhyNot, taken: set[str]
) -> Iterator[tuple[FloatIsland, str | None]]:
    """Cut an island that cannot be lowered into parts that can and parts that cannot be.

    Nodes are grouped by levels that alternate between the two kinds, as the segments of a program are, so no
    two parts depend on each other in a circle.

    Args:
        island: Cannot be lowered as a whole.
        reason: Why.
        why_not: Returns why an island cannot be lowered, or None if it can.
        taken: Names of steps; those of the parts are added.

    Yields:
        The parts, each after those it depends on, and why it cannot be lowered, or None. The island itself if
        a tensor between two parts would have no static shape.
    """
    cutter = _Cutter(island)
    reasons = {node: cutter.why_not_node(node, why_not) for node in cutter.nodes}
    groups = cutter.groups(reasons)
    models = [cutter.cut(group) for group in groups]
    if len(groups) == 1 or any(_open_end(model) for model in models):
        yield island, reason
        return
    for group, model in zip(groups, models, strict=True):
        part = _as_island(_free_name(f"float_{node_label(group[0])}", taken), group, model)
        yield part, _summary([r for n in group if (r := reasons[n]) is not None]) or why_not(part)


def boundary(model: ir.Model) -> dict[str, ir.Value]:
    """Return the inputs and outputs of a model by name."""
    return {v.name or "": v for v in (*model.graph.inputs, *model.graph.outputs)}


def _open_end(model: ir.Model) -> str | None:
    """Return the name of an input or output that is no tensor of a static shape."""
    for name, value in boundary(model).items():
        if static_shape(value) is None or value.dtype is None or not isinstance(value.type, ir.TensorType):
            return name
    return None


def _summary(reasons: Sequence[str]) -> str | None:
    more = len(reasons) - 1
    return None if not reasons else reasons[0] + (f" (and {more} more nodes)" if more else "")


def _free_name(stem: str, taken: set[str]) -> str:
    name = next(n for k in count(1) if (n := stem if k == 1 else f"{stem}_{k}") not in taken)
    taken.add(name)
    return name


def _as_island(name: str, group: Sequence[ir.Node], model: ir.Model) -> FloatIsland:
    inputs, outputs = (
        tuple(v.name or "" for v in side) for side in (model.graph.inputs, model.graph.outputs)
    )
    return FloatIsland(name=name, inputs=inputs, outputs=outputs, nodes=labels(*group), model=model)


class _Cutter:
    """Answers questions about one island's graph."""

    def __init__(self, island: FloatIsland) -> None:
        self.model = island.model
        self.graph = graph = island.model.graph
        producers = {v.producer() for v in graph.outputs}
        # A constant that the island is asked for is a node of its own, also where others copy it.
        self.copied = copied_nodes(graph) - producers
        self.nodes = [n for n in graph if n not in self.copied]
        self.reads = {n: read_values(n, graph) for n in self.nodes}
        self.readers: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node, values in self.reads.items():
            for value in values:
                self.readers[value].append(node)

    def cut(self, group: Sequence[ir.Node]) -> ir.Model:
        """Return the model of some nodes."""
        own = set(group)
        reads = dict.fromkeys(v for n in group for v in self.reads[n])
        inside = own | self.copied
        inputs = [v for v in reads if not v.is_initializer() and v.producer() not in inside]
        outputs = [
            v
            for n in group
            for v in n.outputs
            if v.is_graph_output() or any(r not in own for r in self.readers[v])
        ]
        return cut_model(self.model, group, inputs, outputs, self.copied)

    def why_not_node(self, node: ir.Node, why_not: WhyNot) -> str | None:
        """Return why one node cannot be lowered alone."""
        model = self.cut([node])
        open_end = _open_end(model)
        if open_end is not None:
            return f"'{node_label(node)}' ({node.op_type}) has a tensor '{open_end}' without a static shape"
        return why_not(_as_island(node_label(node), [node], model))

    def groups(self, reasons: Mapping[ir.Node, str | None]) -> list[list[ir.Node]]:
        """Group nodes: connected and of one level; in the order of levels."""
        edges = [
            (p, n)
            for n in self.nodes
            for v in self.reads[n]
            if (p := v.producer()) is not None and p in reasons
        ]
        levels = _levels(self.nodes, edges, reasons)
        found: nx.Graph[ir.Node] = nx.Graph()
        found.add_nodes_from(self.nodes)
        found.add_edges_from((a, b) for a, b in edges if levels[a] == levels[b])
        position = {n: i for i, n in enumerate(self.nodes)}
        groups = [sorted(group, key=position.__getitem__) for group in nx.connected_components(found)]
        return sorted(groups, key=lambda group: (levels[group[0]], position[group[0]]))


def _levels(
    nodes: Sequence[ir.Node], edges: Edges, reasons: Mapping[ir.Node, str | None]
) -> dict[ir.Node, int]:
    """Return a level for every node: odd where it is left to ONNX Runtime."""
    before, behind = defaultdict(list), defaultdict(list)
    for a, b in edges:
        before[b].append(a)
        behind[a].append(b)
    follows = {n for n in nodes if reasons[n] is None and is_op(n, *COMING_ALONG)}
    levels: dict[ir.Node, int] = {}
    for node in nodes:
        base = max((levels[p] for p in before[node]), default=0)
        levels[node] = base if node in follows else raised(base, reasons[node] is not None)
    for node in reversed(nodes):
        # What is moved only for ONNX Runtime to read is moved there.
        lowest = min((levels[r] for r in behind[node]), default=0)
        if node in follows and lowest % 2 and not any(v.is_graph_output() for v in node.outputs):
            levels[node] = lowest
    return levels
