"""Where a model can be cut so that one value passes everything on: a chain of parts, one behind the other.

In a transformer the cuts are the residual stream before attention and before the feed-forward block. They are found
as dominators, whatever the nodes are called: values that every path to the last output goes through. What does not
depend on the stream (masks, rotary tables looked up by position) takes no part in the search; it is computed in the
first part and read by many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import node_label, subgraphs

# Operators whose constant operand is a matrix or kernel worth a part of its own.
PRODUCTS = ("MatMul", "Gemm", "Conv", "MatMulNBits")
# What a weight passes through before a product reads it.
BETWEEN = ("Cast", "Transpose", "Reshape", "Identity", "DequantizeLinear", "Squeeze", "Unsqueeze")
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, None)
START = "start"
FIX = "leave --stream out: the model is then quantized as a whole, in memory"


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive operators.

    Attributes:
        nodes: In graph order; what depends on constants alone belongs to every part that reads it.
        entry: The value that enters from the part before; None for the first part.
        leaves: The value that the next part enters with; None for the last part.
        shared: Values of the first part that this one reads as well.
        inputs: Graph inputs that it reads.
        outputs: Values that other parts or the user read.
        products: Names of the operators with constant weights.
    """

    nodes: tuple[ir.Node, ...]
    entry: ir.Value | None
    leaves: ir.Value | None
    shared: tuple[ir.Value, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    products: tuple[str, ...]


def chain_of(model: ir.Model) -> tuple[Part, ...]:
    """Cut a model into parts.

    Args:
        model: Functions inlined, constants lifted, nodes named and sorted; not changed.

    Raises:
        ModelError: No value between two products passes everything on, or a side path leads around one.
    """
    flow = _Flow(model)
    cuts = _useful(flow, _branching(flow, _dominating(flow)))
    if not cuts:
        what = "no value inside passes everything on, so the model is no chain of parts"
        raise ModelError(what, where=f"graph '{model.graph.name or ''}'", fix=FIX)
    return tuple(_parts(flow, cuts))


class _Flow:
    """What depends on what: nodes with constant operands, nodes that depend on constants alone, and the rest."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.nodes = list(model.graph)
        self.constant: set[ir.Value] = set(model.graph.initializers.values())
        self.varying: list[ir.Node] = []
        for node in self.nodes:
            if all(v in self.constant for v in read_values(node)) and not _is_random(node):
                self.constant.update(node.outputs)
            else:
                self.varying.append(node)
        self.readers: dict[ir.Value, list[ir.Node]] = {}
        for node in self.varying:
            for value in dict.fromkeys(self.read(node)):
                self.readers.setdefault(value, []).append(node)
        self.products = {n for n in self.varying if _has_weight(n, self.constant)}

    def read(self, node: ir.Node) -> list[ir.Value]:
        """Return the values a node reads that are no constants."""
        return [v for v in read_values(node) if v not in self.constant]

    def leaves(self, value: ir.Value, nodes: set[ir.Node]) -> bool:
        """Tell whether anybody but some nodes reads a value."""
        return value.is_graph_output() or any(n not in nodes for n in self.readers.get(value, ()))

    def behind(self, starts: Iterable[ir.Value]) -> set[ir.Value]:
        """Return all values that depend on some values, these included."""
        found = set(starts)
        for node in self.varying:
            if any(v in found for v in self.read(node)):
                found.update(node.outputs)
        return found

    def before(self, ends: Iterable[ir.Value]) -> set[ir.Value]:
        """Return all values that some values depend on, these included."""
        found = set(ends)
        for node in reversed(self.varying):
            if any(o in found for o in node.outputs):
                found.update(self.read(node))
        return found


def read_values(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads, also inside its bodies; an operand that is left out is none."""
    yield from (v for v in node.inputs if v is not None)
    for body in subgraphs(node):
        inside = {*body.inputs, *body.initializers.values(), *(o for n in body for o in n.outputs)}
        for inner in body:
            yield from (v for v in read_values(inner) if v not in inside)
        yield from (v for v in body.outputs if v not in inside)


def _is_random(node: ir.Node) -> bool:
    return node.op_type.startswith(("Random", "Multinomial", "Bernoulli"))


def _has_weight(node: ir.Node, constant: set[ir.Value]) -> bool:
    return node.op_type in PRODUCTS and len(node.inputs) > 1 and node.inputs[1] in constant


def _dominating(flow: _Flow) -> list[ir.Value]:
    """Return the values that every path to the last output goes through, in order."""
    behind = flow.behind(o for n in flow.products for o in n.outputs)
    ends = [o for o in flow.graph.outputs if o in behind]
    if not ends:
        return []
    last = max(ends, key=lambda o: len(flow.before([o]) & behind))
    above = nx.immediate_dominators(_paths(flow, behind), START)
    found: list[object] = [last]
    while (place := above.get(found[-1], START)) != START:
        found.append(place)
    values = [v for v in reversed(found) if isinstance(v, ir.Value)]
    return [v for v in values[:-1] if v.producer() is not None and v.dtype in FLOATS]


def _paths(flow: _Flow, behind: set[ir.Value]) -> nx.DiGraph[object]:
    """Return values and nodes from where the first products take their data to the outputs, behind one start.

    A mask that later nodes add is no beginning, nor are sizes that were computed on the way.
    """
    first = [n for n in flow.products if not any(v in behind for v in flow.read(n))]
    stem = flow.before(v for n in first for v in flow.read(n))
    graph: nx.DiGraph[object] = nx.DiGraph()
    for node in flow.varying:
        late = any(o in behind for o in node.outputs)
        if not late and not any(o in stem for o in node.outputs):
            continue
        for value in flow.read(node):
            if value in behind or (value in stem and (not late or value.dtype in FLOATS)):
                graph.add_edge(value, node)
        graph.add_edges_from((node, o) for o in node.outputs)
    begins: list[object] = [v for v in stem if v.is_graph_input() and v in graph]
    graph.add_edges_from((START, v) for v in begins or first)
    return graph


def _branching(flow: _Flow, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the residual stream: values with several readers, and what comes behind the last of them.

    A model without any branch may be cut everywhere.
    """
    wide = [k for k, v in enumerate(values) if len(flow.readers.get(v, ())) > 1]
    if not wide:
        return list(values)
    return [v for k, v in enumerate(values) if k in wide or k > wide[-1]]


def _useful(flow: _Flow, values: Sequence[ir.Value]) -> list[ir.Value]:
    """Leave out cuts in front of which, or behind which, there would be no product."""
    kept: list[ir.Value] = []
    before = len(flow.products)
    for value in values:
        later = flow.behind([value]) - {value}
        after = sum(n.outputs[0] in later for n in flow.products)
        if after and (after < before or not kept):
            kept.append(value)
            before = after
    return kept


def _parts(flow: _Flow, cuts: Sequence[ir.Value]) -> Iterator[Part]:
    level = _levels(flow, cuts)
    for number, entry in enumerate([None, *cuts]):
        nodes = [n for n in flow.varying if level[n.outputs[0]] == number]
        own = set(nodes)
        reads = list(dict.fromkeys(v for n in nodes for v in flow.read(n)))
        made = {o for n in nodes for o in n.outputs}
        foreign = [v for v in reads if v not in made and v is not entry and v not in flow.graph.inputs]
        for value in foreign:
            if level[value] != 0:
                what = f"part {number} reads it, too: a side path around '{entry.name if entry else ''}'"
                raise ModelError(what, where=f"tensor '{value.name}'", fix=FIX)
        yield Part(
            nodes=tuple(nodes),
            entry=entry,
            leaves=cuts[number] if number < len(cuts) else None,
            shared=tuple(foreign),
            inputs=tuple(v for v in flow.graph.inputs if v in reads),
            outputs=tuple(o for n in nodes for o in n.outputs if flow.leaves(o, own)),
            products=tuple(node_label(n) for n in nodes if n in flow.products),
        )


def _levels(flow: _Flow, cuts: Sequence[ir.Value]) -> dict[ir.Value, int]:
    """Return the number of the part that makes each varying value: that of the last cut it depends on."""
    begins = {v: k for k, v in enumerate(cuts, 1)}
    level = dict.fromkeys(flow.graph.inputs, 0)
    for node in flow.varying:
        found = max((max(level[v], begins.get(v, 0)) for v in flow.read(node)), default=0)
        level.update(dict.fromkeys(node.outputs, found))
    return level
