"""From offered steps to a program: what the outputs need, and float islands for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import networkx as nx
import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array, is_op, node_label, static_shape
from bitwright.compiler.program.cut import copied_nodes, cut_model, read_values
from bitwright.compiler.program.draft import Draft, labels
from bitwright.compiler.program.ops import Dequantize, FloatIsland, Program, Step, Tensor


@dataclass
class _Needed:
    """What the graph outputs need.

    Attributes:
        steps: Steps by identity, in order of discovery.
        nodes: Nodes that stay ONNX, in order of discovery.
        constants: Constants that steps or outputs read.
    """

    steps: dict[int, Step] = field(default_factory=dict)
    nodes: dict[ir.Node, None] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)


class Assembler:
    """Chooses and orders the steps of one draft."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._graph = draft.model.graph
        self._position = {node: i for i, node in enumerate(self._graph)}
        self._copied = copied_nodes(self._graph)
        self._values = {v.name: v for n in self._graph for v in n.outputs if v.name}
        self._values |= {v.name: v for v in self._graph.inputs if v.name}
        self._values |= dict(self._graph.initializers)
        self._needed = _Needed()

    def program(self) -> Program:
        """Build the program."""
        outputs = tuple(v.name or "" for v in self._graph.outputs)
        initializers = self._graph.initializers
        inputs = tuple(v.name or "" for v in self._graph.inputs if v.name not in initializers)
        self._collect([*outputs])
        steps = self._ordered()
        names = [*inputs, *outputs, *self._needed.constants]
        names += [n for s in steps for n in (*s.inputs, *s.outputs)]
        tensors = {name: self._tensor(name) for name in dict.fromkeys(names)}
        notes = tuple(dict.fromkeys(self._draft.notes))
        return Program(inputs, outputs, steps, tensors, self._needed.constants, notes)

    # Which steps and nodes are needed.

    def _collect(self, names: list[str]) -> None:
        seen: set[str] = set()
        while names:
            name = names.pop()
            if name not in seen:
                seen.add(name)
                names.extend(self._source(name))

    def _source(self, name: str) -> Iterable[str]:
        """Record what produces the tensor ``name``; return the tensors that this needs in turn."""
        step = self._draft.steps.get(name) or self._dequantize(name)
        if step is not None:
            self._needed.steps[id(step)] = step
            return step.inputs
        constant = self._draft.constants.get(name)
        value = self._values.get(name)
        constant = constant_array(value) if constant is None else constant
        if constant is not None:
            self._needed.constants[name] = constant
            return ()
        node = None if value is None else value.producer()
        if node is None:
            return ()
        self._needed.nodes[node] = None
        return [v.name or "" for v in self._variables(node)]

    def _dequantize(self, name: str) -> Step | None:
        """Offer the Dequantize step of a float value that views an integer tensor."""
        value = self._values.get(name)
        view, shape = self._draft.view(value), static_shape(value)
        if value is None or view is None or shape is None:
            return None
        producer = value.producer()
        covered = labels(producer) if is_op(producer, "DequantizeLinear") else ()
        label = self._draft.label(node_label(producer) if covered and producer else f"{name}_dequantize")
        step = Dequantize(name=label, inputs=(view.name,), outputs=(name,), nodes=covered)
        self._draft.add(step, Tensor(name, shape, "float32"))
        return step

    def _variables(self, node: ir.Node) -> list[ir.Value]:
        """The values a node reads, its subgraphs included, that must be computed or fed."""
        return [
            v
            for v in read_values(node, self._graph)
            if not v.is_initializer() and v.producer() not in self._copied
        ]

    # Order and islands.

    def _ordered(self) -> tuple[Step, ...]:
        units: nx.DiGraph[str | ir.Node] = nx.DiGraph()
        readers: dict[str | ir.Node, tuple[str, ...]] = {
            s.outputs[0]: s.inputs for s in self._needed.steps.values()
        }
        readers |= {n: tuple(v.name or "" for v in self._variables(n)) for n in self._needed.nodes}
        writer: dict[str, str | ir.Node] = {
            name: s.outputs[0] for s in self._needed.steps.values() for name in s.outputs
        }
        writer |= {v.name: n for n in self._needed.nodes for v in n.outputs if v.name}
        units.add_nodes_from(readers)
        units.add_edges_from(
            (writer[n], unit) for unit, names in readers.items() for n in names if n in writer
        )
        steps: list[Step] = list(self._needed.steps.values())
        steps += [self._island(group) for group in _islands(units)]
        return _sorted_steps(steps, self._step_position)

    def _step_position(self, step: Step) -> int:
        """Where the step's result stands in the model: keeps the program's order close to the model's."""
        value = self._values.get(step.outputs[0])
        node = None if value is None else value.producer()
        return self._position.get(node, 0) if node is not None else 0

    def _island(self, nodes: set[ir.Node]) -> FloatIsland:
        own = sorted(nodes, key=self._position.__getitem__)
        produced = {v for n in own for v in n.outputs}
        reads = dict.fromkeys(v for n in own for v in self._variables(n))
        inputs = [v for v in reads if v not in produced]
        outside = {n for s in self._needed.steps.values() for n in s.inputs}
        outside |= {v.name or "" for n in self._needed.nodes if n not in nodes for v in self._variables(n)}
        outputs = [v for n in own for v in n.outputs if v.is_graph_output() or v.name in outside]
        model = self._island_model(own, inputs, outputs)
        return FloatIsland(
            name=self._draft.label(f"float_{node_label(own[0])}"),
            inputs=tuple(v.name or "" for v in inputs),
            outputs=tuple(v.name or "" for v in outputs),
            nodes=labels(*own),
            model=model,
        )

    def _island_model(self, own: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        for value in (*inputs, *outputs):
            self._tensor(value.name or "")
        return cut_model(self._draft.model, own, inputs, outputs, self._copied)

    def _tensor(self, name: str) -> Tensor:
        known = self._draft.tensors.get(name)
        if known is not None:
            return known
        value = self._values[name]
        constant = self._needed.constants.get(name)
        if constant is not None:
            return Tensor(name, constant.shape, constant.dtype.name)
        shape = static_shape(value)
        if shape is None or value.dtype is None or not isinstance(value.type, ir.TensorType):
            what = "the tensor between two parts of the program has no static shape or is no tensor"
            raise ModelError(
                what,
                where=f"tensor '{name}'",
                fix="fix all input dimensions, or remove the operator whose output shape depends on data",
            )
        return Tensor(name, shape, value.dtype.numpy().name)


def assemble(draft: Draft) -> Program:
    """Take the steps that the graph outputs need and group the remaining nodes into float islands.

    Raises:
        ModelError: A tensor at a boundary has no static shape, or no tensor type.
    """
    return Assembler(draft).program()


def _islands(units: nx.DiGraph[str | ir.Node]) -> list[set[ir.Node]]:
    """Group ONNX nodes: connected, and after equally many alternations between integer and float.

    A path that leaves an island passes an integer step and so reaches a higher level: islands are convex, and
    no two depend on each other in a circle.

    Args:
        units: Graph of integer steps (by name of their first output) and ONNX nodes.
    """
    level: dict[str | ir.Node, int] = {}
    for unit in nx.topological_sort(units):
        parity = 0 if isinstance(unit, str) else 1
        above = [level[p] + (level[p] % 2 != parity) for p in units.predecessors(unit)]
        level[unit] = max(above, default=parity)
    floats: nx.Graph[ir.Node] = nx.Graph()
    floats.add_nodes_from(u for u in units if not isinstance(u, str))
    for a, b in units.edges:
        if not isinstance(a, str) and not isinstance(b, str) and level[a] == level[b]:
            floats.add_edge(a, b)
    return [set(group) for group in nx.connected_components(floats)]


def _sorted_steps(steps: list[Step], position: Callable[[Step], int]) -> tuple[Step, ...]:
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(steps)))
    writer = {name: i for i, step in enumerate(steps) for name in step.outputs}
    graph.add_edges_from((writer[n], i) for i, s in enumerate(steps) for n in s.inputs if n in writer)
    order = nx.lexicographical_topological_sort(graph, key=lambda i: position(steps[i]))
    return tuple(steps[i] for i in order)
