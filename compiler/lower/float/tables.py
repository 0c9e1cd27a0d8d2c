"""Tables that are looked up: stored in half precision where that holds their values exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from bitwright.compiler.lower.float.bindings import constant
from bitwright.compiler.lower.float.storage import HALF, storage_of

_TAKE = tvm.ir.Op.get("relax.take")
SMALLEST_TABLE = 4096  # values; below, the conversion costs more than the bytes


def narrow_tables(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with float32 tables in half precision, widened behind the look-up."""
    if not any(_has_table(f) for _, f in module.functions_items() if isinstance(f, relax.Function)):
        return module
    rewriter = _Narrow(module)
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function):
            rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
    return rewriter.builder_.get()


def _has_table(function: Any) -> bool:
    bindings = [b for block in function.body.blocks for b in block.bindings]
    return any(_narrowed(b.value) is not None for b in bindings)


def _narrowed(value: Any) -> np.ndarray | None:
    """Return the table of a look-up in half precision, if it is a large one and that holds it exactly."""
    if not isinstance(value, tvm.ir.Call) or value.op != _TAKE:
        return None
    table = constant(value.args[0])
    if table is None or table.dtype != np.float32 or table.size < SMALLEST_TABLE:
        return None
    return table.astype(np.float16) if storage_of(table) == HALF else None


@mutator
class _Narrow(PyExprMutator):  # type: ignore[misc]
    def visit_call_(self, call: Any) -> Any:
        table = _narrowed(call)
        call = self.visit_expr_post_order(call)
        if table is None:
            return call
        found = relax.op.take(
            relax.const(table, HALF), call.args[1], axis=call.attrs.axis, mode=call.attrs.mode
        )
        return relax.op.astype(self.builder_.emit(found), "float32")
