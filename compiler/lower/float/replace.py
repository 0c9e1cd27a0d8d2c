"""Puts hand-written kernels in the place of float operators, before Relax legalizes what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import tvm
from tvm import ir, relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from bitwright.compiler.lower.float.bindings import Bindings, float_shape, permuted
from bitwright.compiler.lower.float.groups import Group, RowBuilder, find_groups
from bitwright.compiler.lower.float.image_order import channels_last
from bitwright.compiler.lower.float.images import ImageOperation, find_images
from bitwright.compiler.lower.float.matmul import matmul_function
from bitwright.compiler.lower.float.products import Product, find_products
from bitwright.compiler.lower.float.rows import row_function
from bitwright.compiler.lower.float.tables import narrow_tables
from bitwright.compiler.lower.float.vectors import VectorUnit, vector_unit
from bitwright.compiler.lower.kernels.loops import OPAQUE
from bitwright.compiler.lower.kernels.move import reorder
from bitwright.compiler.lower.layout import row_major
from bitwright.compiler.program.ops import Tensor


@dataclass(frozen=True)
class Replacement:
    """What stands for some operators.

    Attributes:
        name: Of the function.
        key: Functions with equal keys are the same. It says all of the function: a geometry or a row program, or a
            tuple.
        make: Returns the function.
        operands: Returns what is read: variables, constants, arrays.
        product: The matrix product that it is, or None.
    """

    name: str
    key: object
    make: Callable[[], tirx.PrimFunc]
    operands: Callable[[], Sequence[Any]]
    product: Product | None = None


def use_float_kernels(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Replace matrix products, convolutions, pooling, elementwise operators and reductions along rows.

    Convolutions of every Relax function are put channels last, with what lies between them.

    Args:
        module: Operators are not legalized yet.
        target: For the width of its vectors.
    """
    unit = vector_unit(target)
    module = channels_last(narrow_tables(module) if unit.widens else module)
    replaced: dict[Any, Replacement] = {}
    dropped: set[Any] = set()
    for _, function in relax_functions(module):
        found, without = find_replacements(function, unit)
        replaced |= found
        dropped |= without
    return with_replacements(module, replaced, dropped)


def with_replacements(
    module: tvm.IRModule, replaced: dict[Any, Replacement], dropped: set[Any]
) -> tvm.IRModule:
    """Return the module with replacements, by variable, and without the variables they make superfluous."""
    return _Replace(module, replaced, dropped).run()


def relax_functions(module: tvm.IRModule) -> list[tuple[Any, Any]]:
    """Return the Relax functions of a module, each with its name."""
    return [(v, f) for v, f in module.functions_items() if isinstance(f, relax.Function)]


def find_replacements(function: Any, unit: VectorUnit) -> tuple[dict[Any, Replacement], set[Any]]:
    """Return what stands for operators of one Relax function, by variable, and the variables it makes superfluous."""
    bindings = Bindings(function)
    replaced: dict[Any, Replacement] = {}
    dropped: set[Any] = set()
    for operation in find_images(bindings):
        if operation.ending.dtype == "float32" and not unit.widens:
            operation = replace(operation, ending=replace(operation.ending, weight_dtype="float32"))
        replaced[operation.root] = _of_image(operation, unit)
        dropped.update(operation.members)
    for product in find_products(bindings):
        if product.geometry.dtype == "float32" and not unit.widens:
            product = replace(product, geometry=replace(product.geometry, weight_dtype="float32"))
        replaced[product.root] = _of_product(product, unit)
        dropped.update(product.members)
    for group in find_groups(bindings):
        group.members -= dropped
        if group.root in group.members:
            replaced[group.root] = _of_group(bindings, group, unit)
            dropped.update(group.members)
    _find_transposes(bindings, replaced, dropped)
    return replaced, dropped - replaced.keys()


def _find_transposes(bindings: Bindings, replaced: dict[Any, Replacement], dropped: set[Any]) -> None:
    """Add what stands for the transposes that something still reads: many kernels read what was not turned."""
    read = [r.operands() if r.product is None else r.product.arguments for r in replaced.values()]
    arguments = {a for operands in read for a in operands if isinstance(a, ir.Var)}
    for variable in bindings.order:
        call = bindings.call(variable, "relax.permute_dims")
        if call is None or variable in dropped or float_shape(call.args[0]) is None:
            continue
        if str(variable.ty.dtype) != "float32":
            continue  # four bytes at a time
        if permuted(call)[-1] == len(call.args[0].ty.shape) - 1:
            continue  # it copies rows
        others = any(user not in dropped for user in bindings.users(variable))
        if others or variable in arguments or bindings.is_result(variable):
            replaced[variable] = _of_transpose(call)


def _of_product(product: Product, unit: VectorUnit) -> Replacement:
    return Replacement(
        "float_matmul",
        product.geometry,
        lambda: matmul_function(product.geometry, unit),
        cache(lambda: (*product.arguments, *product.constants(unit))),
        product,
    )


def _of_image(operation: ImageOperation, unit: VectorUnit) -> Replacement:
    name = {None: "float_convolution", "multiply": "float_depthwise"}.get(operation.operation, "float_pool")
    operands = cache(lambda: operation.operands(unit))
    return Replacement(name, operation.key, lambda: operation.function(unit), operands)


def _of_transpose(call: Any) -> Replacement:
    shape, axes = float_shape(call.args[0]), permuted(call)
    assert shape is not None
    tensor = Tensor("x", shape, "float32")
    return Replacement(
        "float_transpose",
        ("transpose", shape, axes),
        lambda: reorder(tensor, row_major(len(shape)), axes).function,
        lambda: (call.args[0],),
    )


def _of_group(bindings: Bindings, group: Group, unit: VectorUnit) -> Replacement:
    builder = RowBuilder(bindings, group)
    program = builder.program()
    sources = tuple(builder.sources)
    return Replacement("float_rows", program, lambda: row_function(program, unit), lambda: sources)


@mutator
class _Replace(PyExprMutator):  # type: ignore[misc]
    """Rebuilds every Relax function with the replacements; what they stand for is left out."""

    def __init__(self, module: tvm.IRModule, replaced: dict[Any, Replacement], dropped: set[Any]) -> None:
        super().__init__(module)
        self.module, self.replaced, self.dropped = module, replaced, dropped
        self.symbols: dict[object, ir.GlobalVar] = {}

    def run(self) -> tvm.IRModule:
        for variable, function in relax_functions(self.module):
            self.builder_.update_func(variable, self.visit_expr(function))
        return self.builder_.get()

    def visit_var_binding_(self, binding: Any) -> None:
        if binding.var in self.dropped:
            return
        if binding.var not in self.replaced:
            super().visit_var_binding_(binding)
            return
        replacement = self.replaced[binding.var]
        shape = float_shape(binding.var)
        assert shape is not None
        arguments = [
            relax.const(a, a.dtype.name) if isinstance(a, np.ndarray) else self.visit_expr(a)
            for a in replacement.operands()
        ]
        call = relax.call_tir(
            self.symbol(replacement),
            relax.Tuple(arguments),
            out_ty=relax.TensorType(shape, binding.var.ty.dtype),
        )
        value = self.builder_.normalize(call)
        inside = isinstance(binding.var, relax.DataflowVar)
        self.set_var_remap(
            binding.var, self.builder_.emit(value) if inside else self.builder_.emit_output(value)
        )

    def symbol(self, replacement: Replacement) -> ir.GlobalVar:
        if replacement.key not in self.symbols:
            marked = replacement.make().with_attr("op_pattern", OPAQUE)
            self.symbols[replacement.key] = self.builder_.add_func(marked, replacement.name)
        return self.symbols[replacement.key]
