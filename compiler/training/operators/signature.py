"""What an operator's function looks like, and how it reads its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import onnx_ir as ir
from torch import Tensor

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import node_label

Inputs: TypeAlias = Sequence[Tensor | None]
Operator: TypeAlias = Callable[[ir.Node, Inputs], tuple[Tensor, ...]]


def required(node: ir.Node, inputs: Inputs, index: int) -> Tensor:
    """Return an input that the operator cannot do without.

    Raises:
        ModelError: The node has no such input.
    """
    found = optional(inputs, index)
    if found is None:
        what = f"{node.op_type} lacks its input {index}"
        raise ModelError(what, where=f"node '{node_label(node)}'", fix="export the model again")
    return found


def optional(inputs: Inputs, index: int) -> Tensor | None:
    """Return an input, or None where it is left out."""
    return inputs[index] if index < len(inputs) else None


def integers(tensor: Tensor | None) -> list[int] | None:
    """Return the elements of a tensor of axes or sizes."""
    return None if tensor is None else [int(v) for v in tensor.reshape(-1).tolist()]


def unsupported(node: ir.Node, what: str) -> ModelError:
    """Return the error for a form of an operator that cannot be trained."""
    return ModelError(
        f"{node.op_type} {what}: there is no form of it that can be trained",
        where=f"node '{node_label(node)}'",
        fix="quantize the model without training, or leave this operator out of it",
    )
