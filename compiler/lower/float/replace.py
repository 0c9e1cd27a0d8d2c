"""Puts hand-written kernels in the place of float operators, before Relax legalizes what is left."""

from __future__ import annotations

from dataclasses import dataclass
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
from bitwright.compiler.lower.float.vectors import VectorUnit, vector_unit
from bitwright.compiler.lower.kernels.loops import OPAQUE
from bitwright.compiler.lower.kernels.move import reorder
from bitwright.compiler.lower.layout import row_major
from bitwright.compiler.program.ops import Tensor


@dataclass(frozen=True)
class _Replacement:
    """What stands for some operators.

    Attributes:
        name: Of the function.
        key: Functions with equal keys are the same.
        make: Returns the function.
        arguments: What is read: variables, constants, arrays.
    """

    name: str
    key: object
    function: Any
    arguments: tuple[Any, ...]


def use_float_kernels(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """Replace matrix products, convolutions, pooling, elementwise operators and reductions along rows.

    Convolutions of every Relax function are put channels last, with what lies between them.

    Args:
        module: Operators are not legalized yet.
        target: For the width of its vectors.
    """
    unit = vector_unit(target)
    module = channels_last(module)
    replaced: dict[Any, _Replacement] = {}
    dropped: set[Any] = set()
    functions: dict[object, tirx.PrimFunc] = {}
    for _, function in _relax_functions(module):
        _find(Bindings(function), unit, replaced, dropped, functions)
    return _Replace(module, replaced, dropped - replaced.keys()).run()


def _relax_functions(module: tvm.IRModule) -> list[tuple[Any, Any]]:
    return [(v, f) for v, f in module.functions_items() if isinstance(f, relax.Function)]


def _find(
    bindings: Bindings,
    unit: VectorUnit,
    replaced: dict[Any, _Replacement],
    dropped: set[Any],
    functions: dict[object, tirx.PrimFunc],
) -> None:
    """Add what stands for operators of one Relax function, and what it makes superfluous."""
    for operation in find_images(bindings):
        replaced[operation.root] = _of_image(operation, unit, functions)
        dropped.update(operation.members)
    for product in find_products(bindings):
        replaced[product.root] = _of_product(product, unit, functions)
        dropped.update(product.members)
    for group in find_groups(bindings):
        group.members -= dropped
        if group.root in group.members:
            replaced[group.root] = _of_group(bindings, group, unit, functions)
            dropped.update(group.members)
    _find_transposes(bindings, replaced, dropped, functions)


def _find_transposes(
    bindings: Bindings,
    replaced: dict[Any, _Replacement],
    dropped: set[Any],
    functions: dict[object, tirx.PrimFunc],
) -> None:
    """Add what stands for the transposes that something still reads: many kernels read what was not turned."""
    arguments = {a for r in replaced.values() for a in r.arguments if isinstance(a, ir.Var)}
    for variable in bindings.order:
        call = bindings.call(variable, "relax.permute_dims")
        if call is None or variable in dropped or float_shape(call.args[0]) is None:
            continue
        if permuted(call)[-1] == len(call.args[0].ty.shape) - 1:
            continue  # it copies rows
        others = any(user not in dropped for user in bindings.users(variable))
        if others or variable in arguments or bindings.is_result(variable):
            replaced[variable] = _of_transpose(call, functions)


def _of_product(product: Product, unit: VectorUnit, functions: dict[object, tirx.PrimFunc]) -> _Replacement:
    key = product.geometry
    if key not in functions:
        functions[key] = matmul_function(product.geometry, unit)
    return _Replacement("float_matmul", key, functions[key], (*product.arguments, *product.constants(unit)))


def _of_image(
    operation: ImageOperation, unit: VectorUnit, functions: dict[object, tirx.PrimFunc]
) -> _Replacement:
    key = operation.key
    if key not in functions:
        functions[key] = operation.function(unit)
    name = {None: "float_convolution", "multiply": "float_depthwise"}.get(operation.operation, "float_pool")
    return _Replacement(name, key, functions[key], operation.operands(unit))


def _of_transpose(call: Any, functions: dict[object, tirx.PrimFunc]) -> _Replacement:
    shape, axes = float_shape(call.args[0]), permuted(call)
    assert shape is not None
    key = ("transpose", shape, axes)
    if key not in functions:
        functions[key] = reorder(Tensor("x", shape, "float32"), row_major(len(shape)), axes).function
    return _Replacement("float_transpose", key, functions[key], (call.args[0],))


def _of_group(
    bindings: Bindings, group: Group, unit: VectorUnit, functions: dict[object, tirx.PrimFunc]
) -> _Replacement:
    builder = RowBuilder(bindings, group)
    program = builder.program()
    if program not in functions:
        functions[program] = row_function(program, unit)
    return _Replacement("float_rows", program, functions[program], tuple(builder.sources))


@mutator
class _Replace(PyExprMutator):  # type: ignore[misc]
    """Rebuilds every Relax function with the replacements; what they stand for is left out."""

    def __init__(self, module: tvm.IRModule, replaced: dict[Any, _Replacement], dropped: set[Any]) -> None:
        super().__init__(module)
        self.module, self.replaced, self.dropped = module, replaced, dropped
        self.symbols: dict[object, ir.GlobalVar] = {}

    def run(self) -> tvm.IRModule:
        for variable, function in _relax_functions(self.module):
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
            for a in replacement.arguments
        ]
        call = relax.call_tir(
            self.symbol(replacement), relax.Tuple(arguments), out_ty=relax.TensorType(shape, "float32")
        )
        value = self.builder_.normalize(call)
        inside = isinstance(binding.var, relax.DataflowVar)
        self.set_var_remap(
            binding.var, self.builder_.emit(value) if inside else self.builder_.emit_output(value)
        )

    def symbol(self, replacement: _Replacement) -> ir.GlobalVar:
        if replacement.key not in self.symbols:
            marked = replacement.function.with_attr("op_pattern", OPAQUE)
            self.symbols[replacement.key] = self.builder_.add_func(marked, replacement.name)
        return self.symbols[replacement.key]
