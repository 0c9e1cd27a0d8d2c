"""Scale and shift the output channels of a constant layer: the algebra behind BatchNormalization folding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, int_attribute, is_op
from bitwright.passes.rewriting import add_initializer, frozen_array, graph_of, set_input


@dataclass(frozen=True)
class Layer:
    """A Conv, ConvTranspose or Gemm with constant weight and constant (or no) bias.

    Attributes:
        node: The node.
        weight: Its weight as stored.
        bias: float64 [channels], zeros where the node has none; for a Gemm already multiplied by ``beta``.
    """

    node: ir.Node
    weight: np.ndarray
    bias: np.ndarray

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return int(self.bias.size)


def constant_layer(node: ir.Node | None) -> Layer | None:
    """Return ``node`` as a Layer, or None if it is no such operator or not constant."""
    if node is None or not is_op(node, "Conv", "ConvTranspose", "Gemm"):
        return None
    weight = frozen_array(node.inputs[1])
    if weight is None or weight.dtype.kind != "f":
        return None
    channels = _channels(node, weight)
    bias = _bias(node, channels)
    return None if bias is None else Layer(node, weight, bias)


def apply_to_channels(layer: Layer, scale: np.ndarray | None, shift: np.ndarray, names: FreshNames) -> None:
    """Make the layer compute ``y * scale + shift`` per output channel instead of ``y``.

    Args:
        layer: The layer, edited in place; initializers shared with other nodes are not
            touched, it gets its own.
        scale: float64 [channels], or None for 1.
        shift: float64 [channels].
        names: Source of initializer names.
    """
    node, graph, dtype = layer.node, graph_of(layer.node), layer.weight.dtype
    bias = layer.bias + shift
    if scale is not None:
        bias = layer.bias * scale + shift
        scaled = (layer.weight.astype(np.float64) * _broadcast(layer, scale)).astype(dtype)
        set_input(node, 1, add_initializer(graph, names(f"{_name(node, 1)}_folded"), scaled))
    set_input(node, 2, add_initializer(graph, names(f"{_name(node, 2)}_folded"), bias.astype(dtype)))
    if "beta" in node.attributes:
        node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)


def _channels(node: ir.Node, weight: np.ndarray) -> int:
    if is_op(node, "Conv"):
        return int(weight.shape[0])
    if is_op(node, "ConvTranspose"):
        return int(weight.shape[1]) * int_attribute(node, "group", 1)
    return int(weight.shape[0 if int_attribute(node, "transB", 0) else 1])


def _bias(node: ir.Node, channels: int) -> np.ndarray | None:
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(channels)
    bias = frozen_array(node.inputs[2])
    if bias is None or bias.size not in (1, channels) or (bias.ndim > 0 and bias.shape[-1] != bias.size):
        return None  # a Gemm may add a whole matrix or a column: no bias per channel
    beta = node.attributes.get_float("beta", 1.0) if is_op(node, "Gemm") else 1.0
    return np.broadcast_to(bias.astype(np.float64).reshape(-1) * beta, (channels,)).copy()


def _broadcast(layer: Layer, scale: np.ndarray) -> np.ndarray:
    """Reshape ``scale`` so that it multiplies the right axes of the stored weight."""
    node, weight = layer.node, layer.weight
    if is_op(node, "Gemm"):
        return scale[:, None] if int_attribute(node, "transB", 0) else scale[None, :]
    if is_op(node, "Conv"):
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    groups = int_attribute(
        node, "group", 1
    )  # weight [C, M/group, ...]: rows of group g write channels of group g
    rows = np.repeat(scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index] if index < len(node.inputs) else None
    return str(value.name) if value is not None and value.name else f"{_name(node, 1)}_bias"
