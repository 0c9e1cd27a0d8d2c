"""Write the RMS normalization of query and key heads in front of an attention that takes heads side by side."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames
from bitwright.compiler.llama.parts import Norm
from bitwright.passes.rewriting import add_initializer

# ReduceMean takes its axes as an input since then.
FIRST_OPSET = 18
FLOAT = ir.DataType.FLOAT


def normalized_heads(
    graph: ir.Graph, names: FreshNames, before: ir.Node, heads: ir.Value, norm: Norm
) -> ir.Value:
    """Write ``gain * (x / sqrt(mean(x^2) + eps))`` over each head.

    The heads of all positions become rows, [batch, length * heads, width], and go back side by side: three dimensions,
    which ``fuse_skip_norms`` and the kernels of artifacts take as they take those of a residual stream.

    Args:
        graph: Of opset 18 or later.
        names: Unused names.
        before: The nodes are put in front of it.
        heads: float32, shape (batch, length, heads * width).
        norm: What is computed; its gains have the width's shape.

    Returns:
        float32, the shape of ``heads``.
    """
    assert heads.shape is not None, "checked by the callers"
    batch, outputs, width = heads.shape[0], heads.shape[2], len(norm.weight)
    rows = ir.Shape([batch, None, width])

    def op(op_type: str, *inputs: ir.Value, shape: ir.Shape) -> ir.Value:
        name = names(f"{heads.name}_heads_{op_type.lower()}")
        node = ir.node(op_type, list(inputs), name=name)
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{name}_out", ir.TensorType(FLOAT), shape.copy()
        graph.insert_before(before, node)
        return value

    def constant(what: str, array: np.ndarray) -> ir.Value:
        return add_initializer(graph, names(f"{heads.name}_{what}"), array)

    x = op("Reshape", heads, constant("rows", np.array([0, -1, width], np.int64)), shape=rows)
    square = op("Pow", x, constant("two", np.array(2.0, np.float32)), shape=rows)
    one = ir.Shape([batch, None, 1])
    mean = op("ReduceMean", square, constant("last", np.array([-1], np.int64)), shape=one)
    epsilon = constant("epsilon", np.array(norm.epsilon, np.float32))
    root = op("Sqrt", op("Add", mean, epsilon, shape=one), shape=one)
    gains = constant("gains", norm.weight)
    scaled = op("Mul", op("Div", x, root, shape=rows), gains, shape=rows)
    whole = outputs if isinstance(outputs, int) else -1
    size = constant("whole", np.array([0, -1, whole], np.int64))
    return op("Reshape", scaled, size, shape=heads.shape)
