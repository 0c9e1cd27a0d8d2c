"""Write the mean over an image as a pooling operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import dtype_of, int_attribute, ints_attribute, is_op, rank
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, frozen_array, graph_of, replace_node

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class MeanToPool:
    """ReduceMean over exactly the two spatial axes of a rank-4 float value becomes GlobalAveragePool.

    With ``keepdims=0`` a Squeeze of the two axes follows.
    """

    name: ClassVar[str] = "mean_to_pool"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite."""
        means = [n for g in model.graphs() for n in g if is_op(n, "ReduceMean") and _is_spatial_mean(n)]
        names = fresh_names(model) if means else None
        for node in means:
            assert names is not None
            pool = ir.node("GlobalAveragePool", [node.inputs[0]], name=names(f"{node.name}_pool"))
            pool.outputs[0].name = names(f"{node.outputs[0].name}_pool")
            pool.outputs[0].type = node.outputs[0].type
            nodes = [pool]
            if not int_attribute(node, "keepdims", 1):
                axes = add_initializer(graph_of(node), names("spatial_axes"), np.array([2, 3], np.int64))
                nodes.append(ir.node("Squeeze", [pool.outputs[0], axes], name=names(f"{node.name}_squeeze")))
            replace_node(node, nodes, list(nodes[-1].outputs))
        return PassResult(model, len(means))


def _is_spatial_mean(node: ir.Node) -> bool:
    source = node.inputs[0]
    if rank(source) != 4 or dtype_of(source) not in FLOATS:
        return False
    if len(node.inputs) > 1:
        constant = frozen_array(node.inputs[1])
        axes = () if constant is None else tuple(int(a) for a in constant)
    else:
        axes = ints_attribute(node, "axes", ())
    return sorted(a % 4 for a in axes) == [2, 3]
