"""Normalizations, reductions and Softmax."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from bitwright.compiler.graph.model import ints_attribute
from bitwright.compiler.training.operators.signature import (
    Inputs,
    Operator,
    integers,
    optional,
    required,
    unsupported,
)


def batch_normalization(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """BatchNormalization with the statistics of the model, as at inference: these are not trained."""
    if node.attributes.get_int("training_mode", 0):
        raise unsupported(node, "in training mode")
    data, scale, bias, mean, variance = (required(node, inputs, k) for k in range(5))
    over = (1, -1, *(1,) * (data.dim() - 2))
    factor = scale / torch.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    return (data * factor.reshape(over) + (bias - mean * factor).reshape(over),)


def _normalized_axes(node: ir.Node, data: Tensor) -> tuple[int, ...]:
    axis = node.attributes.get_int("axis", -1)
    return tuple(range(axis % data.dim(), data.dim()))


def layer_normalization(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """LayerNormalization, first output only."""
    data = required(node, inputs, 0)
    if len([o for o in node.outputs if o.name]) > 1:
        raise unsupported(node, "with mean and deviation as outputs")
    axes = _normalized_axes(node, data)
    centred = data - data.mean(dim=axes, keepdim=True)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    found = centred / torch.sqrt(centred.square().mean(dim=axes, keepdim=True) + epsilon)
    bias = optional(inputs, 2)
    found = found * required(node, inputs, 1)
    return (found if bias is None else found + bias,)


def rms_normalization(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """RMSNormalization."""
    data = required(node, inputs, 0)
    axes = _normalized_axes(node, data)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    root = torch.sqrt(data.square().mean(dim=axes, keepdim=True) + epsilon)
    return (data / root * required(node, inputs, 1),)


def softmax(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Softmax over one axis."""
    return (torch.softmax(required(node, inputs, 0), dim=node.attributes.get_int("axis", -1)),)


def log_softmax(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """LogSoftmax over one axis."""
    return (torch.log_softmax(required(node, inputs, 0), dim=node.attributes.get_int("axis", -1)),)


def _reduction(reduce: Callable[..., Tensor]) -> Operator:
    def run(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
        data, axes = required(node, inputs, 0), integers(optional(inputs, 1))
        if axes is None:
            axes = list(ints_attribute(node, "axes", ()))
        if not axes:
            if node.attributes.get_int("noop_with_empty_axes", 0):
                return (data,)
            axes = list(range(data.dim()))
        return (reduce(data, dim=axes, keepdim=bool(node.attributes.get_int("keepdims", 1))),)

    return run


NORMALIZATION: dict[str, Operator] = {
    "BatchNormalization": batch_normalization,
    "LayerNormalization": layer_normalization,
    "RMSNormalization": rms_normalization,
    "Softmax": softmax,
    "LogSoftmax": log_softmax,
    "ReduceL2": _reduction(torch.linalg.vector_norm),
    "ReduceMean": _reduction(torch.mean),
    "ReduceSum": _reduction(torch.sum),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMin": _reduction(torch.amin),
}
