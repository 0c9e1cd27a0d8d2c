"""Nodes and initializers, written one after the other."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bitwright.compiler.hugging_face.checkpoint import Checkpoint
from bitwright.compiler.hugging_face.lazy_weight import LazyWeight


class GraphWriter:
    """What a graph consists of so far.

    Attributes:
        nodes: In the order of computation.
    """

    def __init__(self, checkpoint: Checkpoint, kind: ir.DataType) -> None:
        """Start an empty graph.

        Args:
            checkpoint: Where the weights are.
            kind: Type of weights and products, FLOAT or FLOAT16.
        """
        self.nodes: list[ir.Node] = []
        self._checkpoint, self._kind = checkpoint, kind
        self._parts = {p.name: p for p in checkpoint.parts.values()}
        self._initializers: dict[str, ir.Value] = {}

    @property
    def initializers(self) -> list[ir.Value]:
        """Constants and weights in the order in which they were first read."""
        return list(self._initializers.values())

    def op(self, op_type: str, *inputs: ir.Value, name: str, **attributes: int | list[int]) -> ir.Value:
        """Write a node; returns its one output, which has its name."""
        node = ir.node(op_type, list(inputs), attributes, name=name)
        self.nodes.append(node)
        node.outputs[0].name = f"{name}.out"
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray | None = None) -> ir.Value:
        """Return a small constant; the array is needed once."""
        if name not in self._initializers:
            assert array is not None, "a constant's first use says what it is"
            self._add(ir.tensor(array, name=name))
        return self._initializers[name]

    def weight(self, name: str, *, transposed: bool = False) -> ir.Value:
        """Return the initializer of a checkpoint's tensor."""
        if name not in self._initializers:
            self._add(LazyWeight(self._checkpoint, self._parts[name], self._kind, transposed=transposed))
        return self._initializers[name]

    def linear(self, x: ir.Value, name: str) -> ir.Value:
        """Write a linear layer, with a bias if the checkpoint has one."""
        product = self.op("MatMul", x, self.weight(f"{name}.weight", transposed=True), name=name)
        if f"{name}.bias" not in self._parts:
            return product
        return self.op("Add", product, self.weight(f"{name}.bias"), name=f"{name}.biased")

    def single(self, x: ir.Value, name: str) -> ir.Value:
        """Convert a value of the working type to float32."""
        return self._cast(x, ir.DataType.FLOAT, name)

    def working(self, x: ir.Value, name: str) -> ir.Value:
        """Convert a float32 value to the working type."""
        return self._cast(x, self._kind, name)

    def _cast(self, x: ir.Value, to: ir.DataType, name: str) -> ir.Value:
        return x if self._kind == ir.DataType.FLOAT else self.op("Cast", x, name=name, to=int(to))

    def _add(self, tensor: ir.TensorProtocol) -> None:
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._initializers[tensor.name or ""] = value
