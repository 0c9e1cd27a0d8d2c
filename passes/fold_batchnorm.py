"""Fold BatchNormalization into the layer in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import int_attribute, is_op, node_label
from bitwright.passes.channel_scaling import Layer, apply_to_channels, constant_layer
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import bypass, fresh_names, frozen_array, only_local_consumer

DEFAULT_EPSILON = 1e-5


@dataclass(frozen=True)
class FoldBatchNorm:
    """Conv, ConvTranspose or Gemm followed by BatchNormalization becomes the layer alone.

    ``scale = gamma / sqrt(var + eps)``, ``shift = beta - mean * scale``, computed in float64 and rounded
    once. A BatchNormalization in training mode, with computed parameters, or behind anything else stays.
    """

    name: ClassVar[str] = "fold_batchnorm"

    def run(self, model: ir.Model) -> PassResult:
        """Fold."""
        found = [n for g in model.graphs() for n in g if is_op(n, "BatchNormalization")]
        if not found:
            return PassResult(model, 0)
        names, folded, notes = fresh_names(model), 0, []
        for norm in found:
            layer, affine = _layer_before(norm), _scale_and_shift(norm)
            if layer is None or affine is None or affine[0].shape != layer.bias.shape:
                notes.append(f"{node_label(norm)}: stays, no foldable layer in front of it")
            elif bypass(norm.outputs[0], layer.node.outputs[0]):
                apply_to_channels(layer, *affine, names)
                folded += 1
        return PassResult(model, folded, tuple(notes))


def _layer_before(norm: ir.Node) -> Layer | None:
    source = norm.inputs[0]
    if source is None or only_local_consumer(source) is not norm:
        return None
    return constant_layer(source.producer())


def _scale_and_shift(norm: ir.Node) -> tuple[np.ndarray, np.ndarray] | None:
    """Return float64 [C] scale and shift, or None if the node is not a constant affine map."""
    if int_attribute(norm, "training_mode", 0) or any(
        o.uses() or o.is_graph_output() for o in norm.outputs[1:]
    ):
        return None
    arrays = [frozen_array(value) for value in norm.inputs[1:5]]
    if any(array is None or array.ndim != 1 for array in arrays):
        return None
    gamma, beta, mean, var = (np.asarray(array, np.float64) for array in arrays)
    scale = gamma / np.sqrt(var + norm.attributes.get_float("epsilon", DEFAULT_EPSILON))
    shift = beta - mean * scale
    return (scale, shift) if np.isfinite(scale).all() and np.isfinite(shift).all() else None
