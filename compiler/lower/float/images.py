"""Convolutions and pooling of a Relax function, channels last: which operators belong to one, and their bounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tvm import tirx

from bitwright.compiler.lower.float.bindings import FLOATS, Bindings, Shape, constant, float_shape
from bitwright.compiler.lower.float.convolution import convolution_function, pack_filters
from bitwright.compiler.lower.float.sliding import Operation, channel_weights, sliding_function
from bitwright.compiler.lower.float.storage import storage_of
from bitwright.compiler.lower.float.vectors import VectorUnit
from bitwright.compiler.lower.float.windows import Ending
from bitwright.compiler.lower.templates.geometry import DotGeometry

CONVOLUTIONS = ("relax.nn.conv2d", "relax.nn.conv1d")
POOLING = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d")


@dataclass(frozen=True)
class ImageOperation:
    """A convolution or pooling with what is fused into it.

    Attributes:
        root: The variable it computes.
        members: All variables it stands for, ``root`` included.
        arguments: Variables that are read: the image, and a tensor that is added.
        operation: What is done along a window; None: a convolution over several channels.
        weight: [O, KH, KW, I], or None.
        bias: A vector [O], or None.
        geometry: Bounds.
        ending: What is fused.
    """

    root: Any
    members: tuple[Any, ...]
    arguments: tuple[Any, ...]
    operation: Operation | None
    weight: np.ndarray | None
    geometry: DotGeometry
    bias: np.ndarray | None = None
    ending: Ending = field(default_factory=Ending)

    @property
    def key(self) -> object:
        """Operations with equal keys have one function."""
        return self.operation, self.geometry, self.ending

    def function(self, unit: VectorUnit) -> tirx.PrimFunc:
        """Return its function; parameters: image, weights, bias, residual, result."""
        if self.operation is None:
            return convolution_function(self.geometry, self.ending, unit)
        return sliding_function(self.geometry, self.operation, self.ending, unit)

    def operands(self, unit: VectorUnit) -> tuple[Any, ...]:
        """Return variables and packed constants in parameter order."""
        found: list[Any] = [self.arguments[0]]
        if self.weight is not None and self.operation is None:
            found.append(pack_filters(self.weight, self.geometry, unit).astype(self.ending.weight_dtype))
        elif self.weight is not None:
            found.append(channel_weights(self.weight).astype(self.ending.weight_dtype))
        return (*found, *([] if self.bias is None else [self.bias]), *self.arguments[1:])


def find_images(bindings: Bindings) -> Iterator[ImageOperation]:
    """Yield the convolutions with constant weights and the pooling of a function, channels last."""
    taken: set[Any] = set()
    for variable in bindings.order:
        call = bindings.operator(variable)
        if call is None or float_shape(variable) is None or variable in taken:
            continue
        found = None
        if call.op.name in CONVOLUTIONS:
            found = _convolution(variable, call)
        elif call.op.name in POOLING:
            found = _pooling(variable, call)
        elif call.op.name == "relax.mean":
            found = _global_mean(variable, call)
        if found is not None:
            whole = _with_followers(bindings, found, taken) if found.weight is not None else found
            taken.update(whole.members)
            yield whole


def _convolution(variable: Any, call: Any) -> ImageOperation | None:
    attrs, weight, shape = call.attrs, constant(call.args[1]), float_shape(call.args[0])
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout))
    result = float_shape(variable)
    if weight is None or weight.dtype.name not in FLOATS or shape is None or result is None:
        return None
    if layouts == ("NHWC", "OHWI", "NHWC"):
        geometry = _geometry(shape, result, call.attrs, weight.shape[1:3], int(attrs.groups))
    elif layouts == ("NWC", "OWI", "NWC"):
        weight = weight[:, None]
        geometry = _geometry(shape, result, call.attrs, weight.shape[1:3], int(attrs.groups))
    else:
        return None
    operation: Operation | None = "multiply" if geometry.is_depthwise else None
    ending = Ending(dtype=str(variable.ty.dtype), weight_dtype=storage_of(weight))
    merged = _rows_merged(geometry)
    return ImageOperation(variable, (variable,), (call.args[0],), operation, weight, merged, ending=ending)


def _geometry(shape: Shape, result: Shape, attrs: Any, kernel: Shape, group: int) -> DotGeometry:
    """Return the bounds; a signal is an image of height 1."""
    strides, dilations = (tuple(int(v) for v in values) for values in (attrs.strides, attrs.dilation))
    pads = tuple(int(v) for v in attrs.padding)
    if len(shape) == 3:
        strides, dilations, pads = (1, *strides), (1, *dilations), (0, pads[0], 0, pads[1])
    n, h, w, c = (shape[0], *([1] if len(shape) == 3 else []), *shape[1:])
    oh, ow = result[-3] if len(result) == 4 else 1, result[-2]
    window = (kernel[0], kernel[1])
    return DotGeometry(
        shape,
        result,
        n,
        h,
        w,
        c,
        oh,
        ow,
        result[-1],
        window,
        (strides[0], strides[1]),
        (pads[0], pads[1], pads[2], pads[3]),
        (dilations[0], dilations[1]),
        group,
    )


def _rows_merged(geometry: DotGeometry) -> DotGeometry:
    """Return a convolution that touches every pixel once as one row of pixels."""
    g = geometry
    if g.kernel != (1, 1) or g.strides != (1, 1) or any(g.pads) or g.is_depthwise:
        return g
    return replace(g, batch=1, height=1, width=g.pixels, out_height=1, out_width=g.pixels)


def _pooling(variable: Any, call: Any) -> ImageOperation | None:
    attrs, shape, result = call.attrs, float_shape(call.args[0]), float_shape(variable)
    if shape is None or result is None or bool(attrs.ceil_mode):
        return None
    if (str(attrs.layout), str(attrs.out_layout)) != ("NHWC", "NHWC"):
        return None
    kernel = tuple(int(v) for v in attrs.pool_size)
    geometry = _geometry(shape, result, attrs, kernel, shape[-1])
    if any(pad >= size for pad, size in zip(geometry.pads, (*kernel, *kernel), strict=True)):
        return None
    operation: Operation = "max"
    if call.op.name.endswith("avg_pool2d"):
        operation = "mean" if bool(attrs.count_include_pad) else "mean_inside"
    ending = Ending(dtype=str(variable.ty.dtype))
    return ImageOperation(variable, (variable,), (call.args[0],), operation, None, geometry, ending=ending)


def _global_mean(variable: Any, call: Any) -> ImageOperation | None:
    shape, result = float_shape(call.args[0]), float_shape(variable)
    if shape is None or result is None or len(shape) != 4 or call.attrs.axis is None:
        return None
    if sorted(int(axis) % 4 for axis in call.attrs.axis) != [1, 2]:
        return None
    n, h, w, c = shape
    geometry = DotGeometry(shape, result, n, h, w, c, 1, 1, c, (h, w), group=c)
    ending = Ending(dtype=str(variable.ty.dtype))
    return ImageOperation(variable, (variable,), (call.args[0],), "mean", None, geometry, ending=ending)


def _with_followers(bindings: Bindings, operation: ImageOperation, taken: set[Any]) -> ImageOperation:
    """Take in a bias, a tensor that is added, and limits, as long as each is the only reader."""
    while True:
        user = bindings.only_user(operation.root)
        call = None if user is None or user in taken else bindings.operator(user)
        if call is None or float_shape(user) != float_shape(operation.root):
            return operation
        found = _with_follower(operation, call)
        if found is None:
            return operation
        operation = replace(found, root=user, members=(*operation.members, user))


def _with_follower(operation: ImageOperation, call: Any) -> ImageOperation | None:
    """Return the operation with the operator behind it, or None if it cannot be part of it."""
    ending, name = operation.ending, call.op.name
    if name == "relax.nn.relu":
        return (
            replace(operation, ending=replace(ending, low=max(ending.low, 0.0))) if ending.high > 0 else None
        )
    if name not in ("relax.add", "relax.maximum", "relax.minimum") or len(call.args) != 2:
        return None
    others = [a for a in call.args if not a.same_as(operation.root)]
    if len(others) != 1:
        return None
    (other,) = others
    array = constant(other)
    if name == "relax.add":
        return _with_sum(operation, other, array)
    if array is None or array.size != 1 or not np.isfinite(array).all():
        return None
    limit = float(array.reshape(()))
    if name == "relax.maximum":
        # clamped from above before: the order of the two would matter
        return replace(operation, ending=replace(ending, low=limit)) if _is_open(ending) else None
    bounded = ending.high < np.inf or limit < ending.low
    return None if bounded else replace(operation, ending=replace(ending, high=limit))


def _is_open(ending: Ending) -> bool:
    return ending.low == -np.inf and ending.high == np.inf


def _with_sum(operation: ImageOperation, other: Any, array: np.ndarray | None) -> ImageOperation | None:
    g, ending = operation.geometry, operation.ending
    if not _is_open(ending) or ending.residual:
        return None
    if array is None:
        if float_shape(other) != float_shape(operation.root):
            return None
        arguments = (*operation.arguments, other)
        return replace(operation, arguments=arguments, ending=replace(ending, residual=True))
    if (
        ending.bias
        or array.dtype.name not in FLOATS
        or array.size != g.outputs
        or array.shape[-1:] != (g.outputs,)
    ):
        return None
    bias = np.ascontiguousarray(array.reshape(-1), np.float32)
    return replace(operation, bias=bias, ending=replace(ending, bias=True))
