"""The elementwise functions between linear layers and a value: where whole channels can be copied, exactly.

Column ``j`` of such a value depends on column ``j`` of the linear layers only. Repeating columns of their weights and
biases (and of vectors in between) therefore repeats channels of the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import FreshNames, consumers, int_attribute, is_op
from bitwright.passes.rewriting import add_initializer, frozen_array, graph_of, set_input

ELEMENTWISE = (
    "Abs",
    "Add",
    "Clip",
    "Div",
    "Elu",
    "Erf",
    "Exp",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Max",
    "Min",
    "Mish",
    "Mul",
    "Neg",
    "Pow",
    "Relu",
    "Selu",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Sub",
    "Swish",
    "Tanh",
    "ThresholdedRelu",
)


@dataclass(frozen=True)
class Region:
    """Linear layers, the elementwise nodes behind them, and the constants with one element a channel.

    Attributes:
        values: Computed values whose last axis is the channels.
        constants: (reader, input index) of weights, biases and vectors.
    """

    values: tuple[ir.Value, ...]
    constants: tuple[tuple[ir.Node, int], ...]


def find_region(value: ir.Value, readers: Sequence[ir.Node], channels: int) -> Region | None:
    """Return the region behind ``value``, or None where channels cannot be copied.

    Args:
        value: The value.
        readers: Nodes that will read the copies; any other reader, of this or a value inside, forbids it.
        channels: Size of the value's last axis.
    """
    search = _Search(channels)
    if not search.add(value):
        return None
    inside = {*search.nodes, *readers}
    for found in search.values:
        graph = readers[0].graph
        if found.is_graph_output() or any(n not in inside or n.graph is not graph for n in consumers(found)):
            return None
    if any(n in search.nodes for n in readers):
        return None
    return Region(tuple(search.values), tuple(search.constants))


def copy_channels(region: Region, index: NDArray[np.intp], names: FreshNames) -> None:
    """Make channel ``j`` of every value of the region what ``index[j]`` was."""
    for node, position in region.constants:
        operand = node.inputs[position]
        array = frozen_array(operand)
        assert array is not None and operand is not None, "the region's constants are constant"
        new = add_initializer(graph_of(node), names(f"{operand.name}_copied"), array[..., index])
        set_input(node, position, new)
    for value in region.values:
        if value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:-1], index.size])


@dataclass
class _Search:
    channels: int
    values: dict[ir.Value, None] = field(default_factory=dict)
    nodes: dict[ir.Node, None] = field(default_factory=dict)
    constants: list[tuple[ir.Node, int]] = field(default_factory=list)

    def add(self, value: ir.Value) -> bool:
        """Take a value and all that it is computed from, up to linear layers."""
        pending = [value]
        while pending:
            value = pending.pop()
            if value in self.values:
                continue
            node = value.producer()
            if node is None or not self._has_channels(value) or len(node.outputs) != 1:
                return False
            self.values[value] = None
            self.nodes[node] = None
            if is_op(node, "MatMul", "Gemm"):
                if not self._root(node):
                    return False
                continue
            operands = self._operands(node)
            if operands is None:
                return False
            pending.extend(operands)
        return True

    def _has_channels(self, value: ir.Value) -> bool:
        return value.shape is not None and len(value.shape) > 0 and value.shape[-1] == self.channels

    def _root(self, node: ir.Node) -> bool:
        weight = frozen_array(node.inputs[1])
        if weight is None or weight.ndim != 2 or int_attribute(node, "transB", 0):
            return False
        if consumers(node.inputs[1]) != [node]:  # type: ignore[arg-type]  # a frozen array has a value
            return False
        self.constants.append((node, 1))
        return len(node.inputs) < 3 or node.inputs[2] is None or self._constant(node, 2)

    def _operands(self, node: ir.Node) -> list[ir.Value] | None:
        """Return the computed operands of an elementwise node, None for any other."""
        if not is_op(node, *ELEMENTWISE):
            return None
        computed = []
        for position, operand in enumerate(node.inputs):
            if operand is None:
                continue
            if frozen_array(operand) is None:
                computed.append(operand)
            elif not self._constant(node, position):
                return None
        return computed or None

    def _constant(self, node: ir.Node, position: int) -> bool:
        """Note a constant with one element a channel; a scalar needs no change."""
        array = frozen_array(node.inputs[position])
        if array is None or array.ndim == 0 or array.shape[-1] == 1:
            return array is not None
        if array.shape[-1] != self.channels:
            return False
        self.constants.append((node, position))
        return True
