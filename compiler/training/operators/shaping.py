"""Operators that move, select and describe: no arithmetic on elements."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from bitwright.compiler.training.operators.signature import (
    Inputs,
    Operator,
    integers,
    optional,
    required,
    unsupported,
)


def shape(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Shape, or a part of it."""
    dims = list(required(node, inputs, 0).shape)
    return (torch.tensor(dims[node.attributes.get_int("start", 0) :][: _shape_length(node, len(dims))]),)


def _shape_length(node: ir.Node, rank: int) -> int | None:
    end = node.attributes.get_int("end", None)
    if end is None:
        return None
    start = node.attributes.get_int("start", 0)
    inside = [max(0, min(rank, v + rank if v < 0 else v)) for v in (start, end)]
    return max(0, inside[1] - inside[0])


def gather(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Gather: rows of any axis by integers of any shape, negative ones from the end."""
    data, indices = required(node, inputs, 0), required(node, inputs, 1).long()
    axis = node.attributes.get_int("axis", 0) % data.dim()
    found = torch.where(indices < 0, indices + data.shape[axis], indices)
    rows = data.index_select(axis, found.reshape(-1))
    return (rows.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :])),)


def reshape(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Reshape; 0 keeps a dimension."""
    data, wanted = required(node, inputs, 0), integers(required(node, inputs, 1)) or []
    if not node.attributes.get_int("allowzero", 0):
        wanted = [data.shape[k] if size == 0 else size for k, size in enumerate(wanted)]
    return (data.reshape(wanted),)


def flatten(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Flatten to a matrix."""
    data = required(node, inputs, 0)
    axis = node.attributes.get_int("axis", 1)
    rows = torch.Size(data.shape[: axis % data.dim() if axis < 0 else axis]).numel()
    return (data.reshape(rows, -1),)


def transpose(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Transpose, by default all axes reversed."""
    data = required(node, inputs, 0)
    order = node.attributes.get_ints("perm", None)
    return (data.permute(tuple(reversed(range(data.dim()))) if order is None else tuple(order)),)


def unsqueeze(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Unsqueeze; axes count in the result."""
    data, axes = required(node, inputs, 0), integers(required(node, inputs, 1)) or []
    result = data.dim() + len(axes)
    for axis in sorted(a % result for a in axes):
        data = data.unsqueeze(axis)
    return (data,)


def squeeze(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Squeeze the named axes, or every axis of length 1."""
    data, axes = required(node, inputs, 0), integers(optional(inputs, 1))
    return (data.squeeze() if axes is None else data.squeeze(tuple(axes)),)


def slices(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Slice with positive steps."""
    data = required(node, inputs, 0)
    starts, ends = integers(required(node, inputs, 1)) or [], integers(required(node, inputs, 2)) or []
    axes = integers(optional(inputs, 3)) or list(range(len(starts)))
    steps = integers(optional(inputs, 4)) or [1] * len(starts)
    if any(step < 1 for step in steps):
        raise unsupported(node, "backwards")
    index = [slice(None)] * data.dim()
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis % data.dim()] = slice(start, end, step)
    return (data[tuple(index)],)


def concat(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Concat."""
    parts = [required(node, inputs, k) for k in range(len(inputs))]
    return (torch.cat(parts, dim=node.attributes.get_int("axis", 0)),)


def split(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Split into the given sizes, or into equal parts, the last of which may be shorter."""
    data, axis = required(node, inputs, 0), node.attributes.get_int("axis", 0)
    sizes, count = integers(optional(inputs, 1)), len(node.outputs)
    if sizes is None:
        length = data.shape[axis]
        each = -(-length // count)
        ends = [min(length, each * k) for k in range(count + 1)]
        sizes = [b - a for a, b in pairwise(ends)]
    return tuple(torch.split(data, sizes, dim=axis))


def expand(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Expand: numpy's broadcasting in both directions."""
    data, wanted = required(node, inputs, 0), integers(required(node, inputs, 1)) or []
    return (data.expand(torch.broadcast_shapes(tuple(data.shape), tuple(wanted))),)


def ranged(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Range."""
    first = required(node, inputs, 0)
    start, limit, step = (required(node, inputs, k).item() for k in range(3))
    return (torch.arange(start, limit, step, dtype=first.dtype),)


def constant_of_shape(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """ConstantOfShape, by default float zeros."""
    value = node.attributes.get_tensor("value", None)
    filler = torch.zeros(1) if value is None else torch.from_numpy(value.numpy().copy())
    return (filler.reshape(()).expand(integers(required(node, inputs, 0)) or []).clone(),)


def pad(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Pad with a constant."""
    if node.attributes.get_string("mode", "constant") != "constant":
        raise unsupported(node, "by other than a constant")
    data, amounts = required(node, inputs, 0), integers(required(node, inputs, 1)) or []
    axes = [a % data.dim() for a in integers(optional(inputs, 3)) or range(data.dim())]
    begin, end = [0] * data.dim(), [0] * data.dim()
    for k, axis in enumerate(axes):
        begin[axis], end[axis] = amounts[k], amounts[k + len(axes)]
    pads = [v for axis in reversed(range(data.dim())) for v in (begin[axis], end[axis])]
    filler = optional(inputs, 2)
    return (functional.pad(data, pads, value=0.0 if filler is None else float(filler)),)


def identity(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Identity."""
    return (required(node, inputs, 0),)


def trilu(node: ir.Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Trilu: one triangle of a matrix."""
    data, diagonal = required(node, inputs, 0), optional(inputs, 1)
    k = 0 if diagonal is None else int(diagonal)
    return (data.triu(k) if node.attributes.get_int("upper", 1) else data.tril(k),)


SHAPING: dict[str, Operator] = {
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Dropout": identity,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "Identity": identity,
    "Pad": pad,
    "Range": ranged,
    "Reshape": reshape,
    "Shape": shape,
    "Slice": slices,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
