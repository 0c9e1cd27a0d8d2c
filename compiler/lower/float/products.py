"""Matrix products of a Relax function: which operators belong to one, and where its operands lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bitwright.compiler.lower.float.bindings import (
    Bindings,
    Shape,
    constant,
    float_shape,
    permuted,
    strides_of,
)
from bitwright.compiler.lower.float.matmul import MatmulGeometry, MatmulParams, Operand, choose_params, pack
from bitwright.compiler.lower.float.storage import storage_of
from bitwright.compiler.lower.float.vectors import VectorUnit


@dataclass(frozen=True)
class Product:
    """A matrix product with what is fused into it.

    Attributes:
        root: The variable it computes.
        members: All variables it stands for, ``root`` included.
        arguments: Variables that are read: the left-hand side, and the right-hand side unless constant.
        weight: A constant right-hand side [k, n], or None.
        bias: A constant vector [n], or None.
        geometry: Bounds, strides, fused operators.
    """

    root: Any
    members: tuple[Any, ...]
    arguments: tuple[Any, ...]
    weight: np.ndarray | None
    bias: np.ndarray | None
    geometry: MatmulGeometry

    def constants(self, unit: VectorUnit) -> list[np.ndarray]:
        """Return the packed constants in parameter order."""
        g = self.geometry
        return self.packed(unit, choose_params(g.m, g.n, unit))

    def packed(self, unit: VectorUnit, params: MatmulParams) -> list[np.ndarray]:
        """Return the constants, the weight for a register tile."""
        dtype = self.geometry.weight_dtype
        weights = [] if self.weight is None else [pack(self.weight, unit, params).astype(dtype)]
        return [*weights, *([] if self.bias is None else [self.bias])]


def find_products(bindings: Bindings, *, strided: bool = True) -> Iterator[Product]:
    """Yield the matrix products of a function.

    Args:
        bindings: Of the function.
        strided: The left-hand side is read, and the result written, through transposes. Without, both are row-major;
            constant weights are seen through their transposes in either case.
    """
    for variable in bindings.order:
        call = bindings.call(variable, "relax.matmul")
        if call is not None and float_shape(variable) is not None:
            shapes = [float_shape(argument) for argument in call.args]
            types = {str(value.ty.dtype) for value in (variable, *call.args)}
            if len(types) == 1 and all(shape is not None and len(shape) >= 2 for shape in shapes):
                yield _with_followers(bindings, _product(bindings, variable, call, strided), strided)


def _product(bindings: Bindings, variable: Any, call: Any, strided: bool) -> Product:
    left, right = (_seen_through(bindings, argument) for argument in call.args)
    left = left if strided else _as_it_is(call.args[0])
    shape = float_shape(variable)
    assert shape is not None
    batch, (m, n) = shape[:-2], shape[-2:]
    weight = _weight(right)
    a = _operand(left, len(batch))
    b = None if weight is not None else _operand(right, len(batch))
    strides = strides_of(shape)
    c = Operand(shape, strides[:-2], strides[-2], strides[-1])
    narrow = "float32" if weight is None else storage_of(weight)
    dtype = str(variable.ty.dtype)
    geometry = MatmulGeometry(batch, m, n, left.shape[-1], a, b, c, dtype=dtype, weight_dtype=narrow)
    if b is None or not any(b.batch):
        geometry = _rows_merged(geometry)
    arguments = (left.value,) if weight is not None else (left.value, right.value)
    return Product(variable, (variable,), arguments, weight, None, geometry)


@dataclass(frozen=True)
class _Seen:
    """An operand behind its transposes: what is read, its shape as an operand, and its strides."""

    value: Any
    shape: Shape
    strides: Shape


def _as_it_is(value: Any) -> _Seen:
    shape = float_shape(value)
    assert shape is not None
    return _Seen(value, shape, strides_of(shape))


def _seen_through(bindings: Bindings, value: Any) -> _Seen:
    call = bindings.call(value, "relax.permute_dims")
    if call is None:
        return _as_it_is(value)
    shape = float_shape(value)
    assert shape is not None
    inner = float_shape(call.args[0])
    assert inner is not None
    return _Seen(call.args[0], shape, tuple(strides_of(inner)[axis] for axis in permuted(call)))


def _weight(seen: _Seen) -> np.ndarray | None:
    """Return a constant matrix as [k, n]."""
    array = constant(seen.value)
    if array is None or any(extent != 1 for extent in seen.shape[:-2]):
        return None
    view = np.lib.stride_tricks.as_strided(
        array, seen.shape[-2:], [s * array.itemsize for s in seen.strides[-2:]]
    )
    return np.ascontiguousarray(view)


def _operand(seen: _Seen, rank: int) -> Operand:
    """Return where an operand lies; missing and broadcast batch axes stand still."""
    steps = [0 if e == 1 else s for e, s in zip(seen.shape[:-2], seen.strides[:-2], strict=True)]
    physical = float_shape(seen.value)
    assert physical is not None
    return Operand(physical, (*[0] * (rank - len(steps)), *steps), seen.strides[-2], seen.strides[-1])


def _rows_merged(geometry: MatmulGeometry) -> MatmulGeometry:
    """Return the product with batch axes as rows: the right-hand side is the same for all of them."""
    g = geometry
    while g.batch:
        *outer, extent = g.batch
        steps = [operand.batch[-1] == operand.row * g.m for operand in (g.a, g.c)]
        if not all(steps) and extent != 1:
            return g
        a, c = (replace(operand, batch=operand.batch[:-1]) for operand in (g.a, g.c))
        b = None if g.b is None else replace(g.b, batch=g.b.batch[:-1])
        g = replace(g, batch=tuple(outer), m=g.m * extent, a=a, b=b, c=c)
    return g


def _with_followers(bindings: Bindings, product: Product, strided: bool) -> Product:
    """Take in a bias, a Relu and a transpose that keeps rows, if they are the only readers."""
    product = _with_bias(bindings, product)
    user = bindings.only_user(product.root)
    if user is not None and bindings.call(user, "relax.nn.relu") is not None:
        product = replace(
            product,
            root=user,
            members=(*product.members, user),
            geometry=replace(product.geometry, relu=True),
        )
    return _with_transpose(bindings, product) if strided else product


def _with_bias(bindings: Bindings, product: Product) -> Product:
    user = bindings.only_user(product.root)
    call = None if user is None else bindings.call(user, "relax.add")
    if call is None:
        return product
    arrays = [constant(argument) for argument in call.args]
    found = [a for a in arrays if a is not None and a.shape[-1:] == (a.size,) == (product.geometry.n,)]
    if not found or float_shape(user) != float_shape(product.root):
        return product
    geometry = replace(product.geometry, bias=True)
    bias = np.ascontiguousarray(found[0].reshape(-1), np.float32)
    return replace(product, root=user, members=(*product.members, user), bias=bias, geometry=geometry)


def _with_transpose(bindings: Bindings, product: Product) -> Product:
    """Write a transposed result right away."""
    user = bindings.only_user(product.root)
    call = None if user is None else bindings.call(user, "relax.permute_dims")
    shape = float_shape(product.root)
    if call is None or shape is None or len(product.geometry.batch) != len(shape) - 2:
        return product
    axes = permuted(call)
    if axes[-1] != len(shape) - 1:
        return product
    result = float_shape(user)
    assert result is not None
    steps = strides_of(result)
    strides = [steps[axes.index(axis)] for axis in range(len(shape))]
    c = Operand(result, tuple(strides[:-2]), strides[-2], strides[-1])
    return replace(
        product, root=user, members=(*product.members, user), geometry=replace(product.geometry, c=c)
    )
