"""Pooling over windows and over everything."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from bitwright.compiler.graph.model import ints_attribute
from bitwright.compiler.training.operators.signature import Inputs, Operator, required, unsupported
from bitwright.compiler.training.operators.windows import Window, padded, window

_MAXIMA = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_MEANS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _form(node: ir.Node, data: Tensor) -> Window:
    if node.attributes.get_int("ceil_mode", 0):
        raise unsupported(node, "with ceil_mode")
    return window(node, tuple(data.shape[2:]), ints_attribute(node, "kernel_shape", ()))


def max_pool(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """MaxPool; padding never wins."""
    data = required(node, inputs, 0)
    if len([o for o in node.outputs if o.name]) > 1:
        raise unsupported(node, "with indices")
    form = _form(node, data)
    filled = padded(data, form, float("-inf"))
    return (_MAXIMA[len(form.sizes)](filled, form.sizes, form.strides, 0, form.dilations),)


def average_pool(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """AveragePool, padding counted or not."""
    data = required(node, inputs, 0)
    form = _form(node, data)
    if any(d != 1 for d in form.dilations):
        raise unsupported(node, "with dilations")
    mean = _MEANS[len(form.sizes)]
    found = mean(padded(data, form, 0.0), form.sizes, form.strides)
    if node.attributes.get_int("count_include_pad", 0) or not any((*form.begin, *form.end)):
        return (found,)
    counted = mean(padded(torch.ones_like(data), form, 0.0), form.sizes, form.strides)
    return (found / counted,)


def global_average_pool(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """GlobalAveragePool."""
    data = required(node, inputs, 0)
    return (data.mean(dim=tuple(range(2, data.dim())), keepdim=True),)


def global_max_pool(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """GlobalMaxPool."""
    data = required(node, inputs, 0)
    return (data.amax(dim=tuple(range(2, data.dim())), keepdim=True),)


POOLING: dict[str, Operator] = {
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
}
