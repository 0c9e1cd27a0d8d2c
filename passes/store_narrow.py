"""Store float32 weights in 16 bits and compute in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.model import FreshNames
from bitwright.passes.contract import PassResult
from bitwright.passes.narrow_rules import FORMATS, FloatFormat, fits, narrowed
from bitwright.passes.rewriting import add_initializer, fresh_names, frozen_array

# Smaller constants are scales, limits and guards: their bytes do not matter, their values do.
MIN_ELEMENTS = 64


@dataclass(frozen=True)
class StoreNarrow:
    """Replace float32 initializers by 16-bit ones with a Cast behind.

    Runtimes fold the Cast when they load the model (ONNX Runtime does), so the file is half as large and the model as
    fast as before. The Cast's result keeps the initializer's name.

    Attributes:
        dtype: ``"float16"`` or ``"bfloat16"``.
        weights: Names of the initializers to narrow; None for all of at least 64 elements.
    """

    dtype: str = "float16"
    weights: frozenset[str] | None = None

    @property
    def name(self) -> str:
        """The pass's name."""
        return "store_narrow"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place; weights that the format cannot hold stay, and a note says so.

        Raises:
            InternalError: ``dtype`` is neither float16 nor bfloat16.
        """
        fmt = FORMATS.get(self.dtype)
        if fmt is None:
            msg = f"no narrow float format '{self.dtype}'"
            raise InternalError(msg)
        names = fresh_names(model)
        changed, notes = 0, []
        for graph in model.graphs():
            for value in list(graph.initializers.values()):
                array = self._wanted(value)
                if array is None:
                    continue
                if why := fits(array, fmt):
                    notes.append(f"weight '{value.name}' keeps float32: {why}")
                    continue
                _store(graph, value, array, fmt, names)
                changed += 1
        return PassResult(model, changed, tuple(notes))

    def _wanted(self, value: ir.Value) -> np.ndarray | None:
        """Return the array of a weight that may be narrowed (a scale of a quantizer may not)."""
        if value.dtype != ir.DataType.FLOAT or value.is_graph_input() or value.is_graph_output():
            return None
        readers = [use.node for use in value.uses()]
        if not readers or any(n.op_type.endswith("QuantizeLinear") or n.op_type == "Cast" for n in readers):
            return None
        if self.weights is not None:
            return frozen_array(value) if value.name in self.weights else None
        array = frozen_array(value)
        return array if array is not None and array.size >= MIN_ELEMENTS else None


def _store(graph: ir.Graph, value: ir.Value, array: np.ndarray, fmt: FloatFormat, names: FreshNames) -> None:
    name = value.name or "weight"
    stored = add_initializer(graph, names(f"{name}_{fmt.name}"), narrowed(array, fmt))
    cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)}, name=names(f"{name}_to_float32"))
    value.replace_all_uses_with(cast.outputs[0])
    del graph.initializers[name]
    out = cast.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
    first = next(iter(graph), None)
    if first is None:  # only subgraphs of other graphs read it
        graph.append(cast)
    else:
        graph.insert_before(first, cast)
