"""Remove what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from bitwright.passes.contract import PassResult


@dataclass(frozen=True)
class RemoveUnused:
    """Remove unused nodes, initializers (of subgraphs too) and imported domains; inputs and outputs stay."""

    name: ClassVar[str] = "remove_unused"

    def run(self, model: ir.Model) -> PassResult:
        """Remove."""
        before = _size(model)
        RemoveUnusedNodesPass()(model)
        for graph in model.graphs():
            for name, value in list(graph.initializers.items()):
                if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                    del graph.initializers[name]
        RemoveUnusedOpsetsPass()(model)
        return PassResult(model, before - _size(model))


def _size(model: ir.Model) -> int:
    return len(model.opset_imports) + sum(len(g) + len(g.initializers) for g in model.graphs())
