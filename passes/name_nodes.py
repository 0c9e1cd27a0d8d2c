"""Give every node and value a unique name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

import onnx_ir as ir

from bitwright.passes.contract import PassResult


@dataclass(frozen=True)
class NameNodes:
    """Name what is unnamed after its operator and rename duplicates, unique over all subgraphs.

    Inputs and outputs of the model keep their names; an optional output that nobody reads stays unnamed.
    """

    name: ClassVar[str] = "name_nodes"

    def run(self, model: ir.Model) -> PassResult:
        """Name."""
        values, nodes = _Names(), _Names()
        changed = sum(values.settle(value, "value") for value in _edges_first(model))
        for graph in model.graphs():
            for node in graph:
                changed += nodes.settle(node, node.op_type)
                for output in node.outputs:
                    if output.name or output.uses():
                        changed += values.settle(output, f"{node.op_type}_out")
        return PassResult(model, changed)


def _edges_first(model: ir.Model) -> Iterator[ir.Value]:
    """Yield inputs, outputs, initializers, the main graph's first: on a clash the later one is renamed."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.outputs
        yield from list(graph.initializers.values())


@dataclass
class _Names:
    """Names given so far and whom they belong to."""

    owners: dict[str, ir.Value | ir.Node] = field(default_factory=dict)

    def settle(self, item: ir.Value | ir.Node, stem: str) -> bool:
        """Make sure that ``item`` has a name of its own; tell whether it had to change."""
        if item.name and self.owners.setdefault(item.name, item) is item:
            return False
        stem = item.name or stem
        item.name = next(name for k in count(1) if (name := f"{stem}_{k}") not in self.owners)
        self.owners[item.name] = item
        return True
