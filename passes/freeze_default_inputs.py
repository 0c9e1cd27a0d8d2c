"""Make initializers that are also listed as graph inputs constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bitwright.passes.contract import PassResult


@dataclass(frozen=True)
class FreezeDefaultInputs:
    """Drop main-graph inputs that have an initializer.

    File formats before IR version 4 had to list every weight as an input; such an input is only a weight. In
    newer files it is an overridable default: the default becomes permanent and a note says so.
    """

    name: ClassVar[str] = "freeze_default_inputs"

    def run(self, model: ir.Model) -> PassResult:
        """Freeze."""
        graph = model.graph
        frozen = [v for v in graph.inputs if v.name in graph.initializers]
        if not frozen:
            return PassResult(model, 0)
        kept = [v for v in graph.inputs if v.name not in graph.initializers]
        graph.inputs.clear()
        graph.inputs.extend(kept)
        names = ", ".join(str(v.name) for v in frozen[:8]) + (", ..." if len(frozen) > 8 else "")
        return PassResult(model, len(frozen), (f"inputs with a default value became constants: {names}",))
