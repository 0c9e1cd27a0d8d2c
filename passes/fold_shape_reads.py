"""Replace reads of known dimensions by constants in a graph that is otherwise dynamic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import int_attribute, is_op
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, frozen_array, graph_of


@dataclass(frozen=True)
class FoldShapeReads:
    """``Gather(Shape(x), i)`` becomes a constant where the gathered dimensions of x are known integers.

    Constant folding needs the whole shape; this needs only the dimensions that are read.
    """

    name: ClassVar[str] = "fold_shape_reads"

    def run(self, model: ir.Model) -> PassResult:
        """Fold."""
        reads = [(n, dims) for g in model.graphs() for n in g if (dims := _known_dims(n)) is not None]
        if not reads:
            return PassResult(model, 0)
        names = fresh_names(model)
        for gather, dims in reads:
            graph, old = graph_of(gather), gather.outputs[0]
            old.replace_all_uses_with(add_initializer(graph, names(f"{old.name}_known"), dims))
            graph.remove(gather, safe=True)
        return PassResult(model, len(reads))


def _known_dims(node: ir.Node) -> np.ndarray | None:
    """Return the int64 result of ``Gather(Shape(x), constant)`` if every dimension it reads is an integer."""
    if not is_op(node, "Gather") or node.inputs[0] is None or node.outputs[0].is_graph_output():
        return None
    shape = node.inputs[0].producer()
    indices = frozen_array(node.inputs[1])
    if shape is None or not is_op(shape, "Shape") or indices is None:
        return None
    source = shape.inputs[0]
    if source is None or source.shape is None:
        return None
    start = int_attribute(shape, "start", 0)
    dims = list(source.shape)[start : int_attribute(shape, "end", len(source.shape))]
    picked = [dims[i] if -len(dims) <= i < len(dims) else None for i in indices.reshape(-1)]
    if not all(isinstance(dim, int) for dim in picked):
        return None
    return np.array(picked, np.int64).reshape(indices.shape)
