"""Put nodes into a topological order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from bitwright.compiler.errors import ModelError
from bitwright.passes.contract import PassResult


@dataclass(frozen=True)
class SortNodes:
    """Sort nodes so that each stands behind its inputs; otherwise they keep their order."""

    name: ClassVar[str] = "sort_nodes"

    def run(self, model: ir.Model) -> PassResult:
        """Sort.

        Raises:
            ModelError: The graph has a cycle.
        """
        try:
            return PassResult(model, int(TopologicalSortPass()(model).modified))
        except ValueError as error:
            msg = "the graph has a cycle"
            raise ModelError(msg, fix="export the model again") from error
