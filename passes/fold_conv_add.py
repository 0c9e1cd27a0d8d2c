"""Fold a constant per-channel Add into the bias of the convolution in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import is_op
from bitwright.passes.channel_scaling import Layer, apply_to_channels, constant_layer
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import bypass, fresh_names, frozen_array, only_local_consumer


@dataclass(frozen=True)
class FoldConvAdd:
    """``Add(Conv(x), c)`` with one constant value a channel (or one in all) becomes a Conv with that bias.

    Holds for ConvTranspose too. A constant that differs over batch or space stays an Add.
    """

    name: ClassVar[str] = "fold_conv_add"

    def run(self, model: ir.Model) -> PassResult:
        """Fold."""
        matches = [m for g in model.graphs() for n in g if is_op(n, "Add") and (m := _match(n))]
        if not matches:
            return PassResult(model, 0)
        names, folded = fresh_names(model), 0
        for add, conv_output, constant in matches:
            layer = constant_layer(conv_output.producer())
            shift = _per_channel(constant, layer)
            if layer is not None and shift is not None and bypass(add.outputs[0], conv_output):
                apply_to_channels(layer, None, shift, names)
                folded += 1
        return PassResult(model, folded)


def _match(add: ir.Node) -> tuple[ir.Node, ir.Value, np.ndarray] | None:
    """Return the Add, the convolution output it reads and its constant."""
    for value, other in (add.inputs, reversed(add.inputs)):
        constant = frozen_array(other)
        if constant is None or value is None or only_local_consumer(value) is not add:
            continue
        if is_op(value.producer(), "Conv", "ConvTranspose"):
            return add, value, constant
    return None


def _per_channel(constant: np.ndarray, layer: Layer | None) -> np.ndarray | None:
    """Return the constant as float64 [channels] if it broadcasts along the channel axis only."""
    if layer is None or constant.ndim > layer.weight.ndim:
        return None
    full = constant.reshape((1,) * (layer.weight.ndim - constant.ndim) + constant.shape)
    if full.shape[1] not in (1, layer.channels) or full.size != full.shape[1]:
        return None
    return np.broadcast_to(full.astype(np.float64).reshape(-1), (layer.channels,))
