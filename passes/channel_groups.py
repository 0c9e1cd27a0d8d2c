"""Which values of a convolutional network can be scaled channel by channel without changing what the network computes.

A factor for each channel of a value can be taken up by the layers that write it (rows of the weight, bias) and taken
back by the layers that read it (columns of the weight). Between the two, positively homogeneous operators let it pass:
their input and output have one factor, and so have all operands of an Add. Values tied in this way form a group; a
group can be scaled if layers are at all its ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import consumers, int_attribute, is_op, node_label
from bitwright.passes.channel_scaling import constant_layer
from bitwright.passes.rewriting import frozen_array

# f(s x) = s f(x) for s > 0, elementwise or within a channel.
HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity", "Neg", "Abs")
POOLING = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool")
VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Values that share one positive factor a channel (axis 1).

    Attributes:
        values: The values, in graph order.
        sources: Conv and Gemm nodes that write one of them.
        sinks: Conv and Gemm nodes that read one of them.
        why_not: Why they cannot be scaled, "" if they can.
    """

    values: tuple[ir.Value, ...]
    sources: tuple[ir.Node, ...]
    sinks: tuple[ir.Node, ...]
    why_not: str = ""

    @property
    def channels(self) -> int:
        """Number of factors."""
        found = channels_of(self.values[0])
        assert found is not None, "values without channels are in no group"
        return found

    @property
    def label(self) -> str:
        """What a note calls it."""
        ends = [", ".join(map(node_label, nodes)) for nodes in (self.sources, self.sinks) if nodes]
        return " to ".join(ends)


def channels_of(value: ir.Value | None) -> int | None:
    """Return the size of axis 1 if it is known."""
    if value is None or value.shape is None or len(value.shape) < 2:
        return None
    size = value.shape[1]
    return size if isinstance(size, int) else None


def is_layer(node: ir.Node) -> bool:
    """Tell whether a node is a Conv or Gemm that only it computes with: its weight constant, and read by no other."""
    return _layer_fault(node) == "" and is_op(node, "Conv", "Gemm")


def channel_groups(model: ir.Model) -> list[ChannelGroup]:
    """Return the groups of the main graph that a layer writes, in graph order; why they cannot be scaled is in them."""
    ties: nx.Graph[ir.Value] = nx.Graph()
    pinned: dict[ir.Value, str] = {}
    for node in model.graph:
        _tie(node, ties, pinned)
    pinned |= _pinned_outside(model)
    order = {value: k for k, value in enumerate(_values(model))}
    parts = [sorted(part & order.keys(), key=order.__getitem__) for part in nx.connected_components(ties)]
    groups = [_group(part, pinned) for part in sorted(filter(None, parts), key=lambda p: order[p[0]])]
    return [g for g in groups if g.sources and (g.sinks or not any(v.is_graph_output() for v in g.values))]


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _group(values: list[ir.Value], pinned: dict[ir.Value, str]) -> ChannelGroup:
    writers = (v.producer() for v in values)
    readers = (node for v in values for node in consumers(v) if node.inputs[0] is v)
    return ChannelGroup(
        tuple(values),
        tuple(n for n in writers if n is not None and is_op(n, "Conv", "Gemm")),
        tuple(dict.fromkeys(n for n in readers if is_op(n, "Conv", "Gemm"))),
        next((pinned[v] for v in values if v in pinned), ""),
    )


def _tie(node: ir.Node, ties: nx.Graph[ir.Value], pinned: dict[ir.Value, str]) -> None:
    """Note which of a node's values share a factor, and which must keep the factor 1."""
    if is_op(node, "Shape", "Size"):
        return  # reads no element
    data = [v for v in node.inputs if v is not None and frozen_array(v) is None]
    ties.add_nodes_from([*data, *node.outputs])
    if is_op(node, "Conv", "Gemm"):
        if fault := _layer_fault(node):
            pinned |= dict.fromkeys([*data, *node.outputs], fault)
        return
    tied = _tied_operands(node)
    free = [] if tied is None else tied
    for value in free:
        ties.add_edge(value, node.outputs[0])
    rest = [v for v in data if v not in free] + list(node.outputs if tied is None else node.outputs[1:])
    pinned |= dict.fromkeys(rest, f"{node.op_type} '{node_label(node)}' does not let a factor through")


def _layer_fault(node: ir.Node) -> str:
    """Return why a Conv or Gemm cannot take factors at both its ends."""
    label = node_label(node)
    if constant_layer(node) is None:
        return f"the weight or bias of '{label}' is no constant that can be scaled"
    weight = node.inputs[1]
    if weight is None or len(weight.uses()) > 1 or weight.is_graph_output():
        return f"the weight of '{label}' is shared"
    if is_op(node, "Gemm") and (
        int_attribute(node, "transA", 0) or node.attributes.get_float("alpha", 1.0) <= 0
    ):
        return f"'{label}' reads its data transposed or turns their sign"
    if node.inputs[0] is None or frozen_array(node.inputs[0]) is not None:
        return f"the data of '{label}' are constant"
    return ""


def _tied_operands(node: ir.Node) -> list[ir.Value] | None:
    """Return the operands that share the factor of the node's first output, or None if no factor passes."""
    first, output = node.inputs[0] if node.inputs else None, node.outputs[0]
    size = channels_of(output)
    if first is None or size is None or size == 0:
        return None
    if is_op(node, "Add", "Sub", "Max", "Min", "Sum"):
        operands = [v for v in node.inputs if v is not None]
        same = all(
            frozen_array(v) is None and channels_of(v) == size and _rank(v) == _rank(output) for v in operands
        )
        return operands if same else None
    if is_op(node, "Mul", "Div"):
        return _scaled_operand(node, size)
    passes = (
        (is_op(node, *HOMOGENEOUS) or _is_lower_bound(node))
        or ((is_op(node, *POOLING) or _interpolates(node)) and _rank(first) == _rank(output))
        or (is_op(node, *VIEWS) and _is_flat(first) and _is_flat(output))
    )
    return [first] if passes and channels_of(first) == size else None


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else len(value.shape)


def _is_flat(value: ir.Value) -> bool:
    """Tell whether a value has nothing but channels: a shape of (N, C, 1, 1, ...)."""
    sizes = [] if value.shape is None else list(value.shape)[2:]
    return value.shape is not None and all(size == 1 for size in sizes)


def _interpolates(node: ir.Node) -> bool:
    """Tell whether a Resize writes nothing but means of what it reads (cropping fills in a constant)."""
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    return is_op(node, "Resize") and mode != "tf_crop_and_resize"


def _is_lower_bound(node: ir.Node) -> bool:
    """Tell whether a Clip is a Relu: bounded by zero below, by nothing above."""
    if not is_op(node, "Clip") or len(node.inputs) < 2:
        return False
    low = frozen_array(node.inputs[1])
    high = node.inputs[2] if len(node.inputs) > 2 else None
    bound = math.inf if high is None else frozen_array(high)
    unbounded = bound is not None and bool(np.max(bound) >= np.finfo(np.float32).max)
    return low is not None and bool(np.all(low == 0)) and unbounded


def _scaled_operand(node: ir.Node, size: int) -> list[ir.Value] | None:
    """Return the operand of a product that has the factor of the result; the other one keeps the factor 1.

    A gate (N, C, 1, 1) is the one that keeps it; of two operands of one shape neither could be told from the other.
    """
    left, right = node.inputs[:2]
    if left is None or right is None or left is right:
        return None
    if frozen_array(right) is None and (is_op(node, "Div") or _is_flat(left) == _is_flat(right)):
        return None
    kept = left if frozen_array(right) is not None or _is_flat(right) else right
    if frozen_array(left) is not None:
        kept = right if is_op(node, "Mul") else left
    if frozen_array(kept) is not None or channels_of(kept) != size or _rank(kept) != _rank(node.outputs[0]):
        return None
    return [kept]


def _pinned_outside(model: ir.Model) -> dict[ir.Value, str]:
    """Return what somebody outside the main graph's nodes reads or writes."""
    pinned = {v: f"'{v.name}' is an input of the graph" for v in model.graph.inputs}
    pinned |= {v: f"'{v.name}' is an output of the graph" for v in model.graph.outputs}
    for value in _values(model):
        if any(use.node.graph is not model.graph for use in value.uses()):
            pinned[value] = f"'{value.name}' is read in a subgraph"
        elif any(is_op(use.node, "Conv", "Gemm") and use.idx > 0 for use in value.uses()):
            pinned[value] = f"'{value.name}' is read as a weight or bias"
        elif channels_of(value) is None:
            pinned[value] = f"the number of channels of '{value.name}' is unknown"
    return pinned
