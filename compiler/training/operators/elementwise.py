"""Functions of single elements, and of pairs with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from bitwright.compiler.training.operators.signature import Inputs, Operator, optional, required, unsupported


def _unary(function: Callable[[Tensor], Tensor]) -> Operator:
    return lambda node, inputs: (function(required(node, inputs, 0)),)


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda node, inputs: (function(required(node, inputs, 0), required(node, inputs, 1)),)


def _several(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda node, inputs: (reduce(function, [required(node, inputs, k) for k in range(len(inputs))]),)


def divide(left: Tensor, right: Tensor) -> Tensor:
    """Div: integers are divided towards zero."""
    exact = left.is_floating_point()
    return left / right if exact else torch.div(left, right, rounding_mode="trunc")


def power(left: Tensor, right: Tensor) -> Tensor:
    """Pow, with the type of the base."""
    if right.numel() == 1 and float(right.detach()) == 2.0:
        return left * left
    return torch.pow(left, right).to(left.dtype)


def leaky_relu(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """LeakyRelu."""
    return (functional.leaky_relu(required(node, inputs, 0), node.attributes.get_float("alpha", 0.01)),)


def hard_sigmoid(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """HardSigmoid."""
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return ((required(node, inputs, 0) * alpha + beta).clamp(0.0, 1.0),)


def gelu(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gelu, exact or by tanh."""
    return (
        functional.gelu(
            required(node, inputs, 0), approximate=node.attributes.get_string("approximate", "none")
        ),
    )


def clip(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Clip; a bound may be left out."""
    data, low, high = required(node, inputs, 0), optional(inputs, 1), optional(inputs, 2)
    data = data if low is None else torch.maximum(data, low)
    return (data if high is None else torch.minimum(data, high),)


def where(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Where."""
    return (torch.where(required(node, inputs, 0), required(node, inputs, 1), required(node, inputs, 2)),)


def cast(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Cast between the types that PyTorch has."""
    to = ir.DataType(node.attributes.get_int("to", int(ir.DataType.FLOAT)))
    if to not in TYPES:
        raise unsupported(node, f"to {to.name}")
    return (required(node, inputs, 0).to(TYPES[to]),)


TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}

ELEMENTWISE: dict[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Cast": cast,
    "Clip": clip,
    "Cos": _unary(torch.cos),
    "Div": _binary(divide),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Gelu": gelu,
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": hard_sigmoid,
    "HardSwish": _unary(functional.hardswish),
    "LeakyRelu": leaky_relu,
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _unary(torch.log),
    "Max": _several(torch.maximum),
    "Min": _several(torch.minimum),
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "Pow": _binary(power),
    "Reciprocal": _unary(torch.reciprocal),
    "Relu": _unary(torch.relu),
    "Sigmoid": _unary(torch.sigmoid),
    "Sin": _unary(torch.sin),
    "Sqrt": _unary(torch.sqrt),
    "Sub": _binary(torch.sub),
    "Tanh": _unary(torch.tanh),
    "Where": where,
}
