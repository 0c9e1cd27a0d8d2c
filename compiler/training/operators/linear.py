"""Products with weights: Conv, Gemm, MatMul."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from bitwright.compiler.training.operators.signature import Inputs, Operator, optional, required, unsupported
from bitwright.compiler.training.operators.windows import padded, window

_CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def convolve(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Conv: NC... times OI..., with any strides, pads, dilations and groups."""
    data, weight = required(node, inputs, 0), required(node, inputs, 1)
    rank = weight.dim() - 2
    if rank not in _CONVOLUTIONS:
        raise unsupported(node, f"over {rank} dimensions")
    form = window(node, tuple(data.shape[2:]), tuple(weight.shape[2:]))
    groups = node.attributes.get_int("group", 1)
    convolution = _CONVOLUTIONS[rank]
    if form.symmetric:
        pads = form.begin
    else:
        data, pads = padded(data, form, 0.0), (0,) * rank
    bias = optional(inputs, 2)
    return (convolution(data, weight, bias, form.strides, pads, form.dilations, groups),)


def gemm(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gemm: ``alpha A B + beta C``."""
    left, right, bias = required(node, inputs, 0), required(node, inputs, 1), optional(inputs, 2)
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    left = left.t() if node.attributes.get_int("transA", 0) else left
    right = right.t() if node.attributes.get_int("transB", 0) else right
    product = left @ right
    product = product if alpha == 1.0 else product * alpha
    if bias is None:
        return (product,)
    return (product + (bias if beta == 1.0 else bias * beta),)


def matmul(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """MatMul, batched like numpy's."""
    return (torch.matmul(required(node, inputs, 0), required(node, inputs, 1)),)


LINEAR: dict[str, Operator] = {"Conv": convolve, "Gemm": gemm, "MatMul": matmul}
