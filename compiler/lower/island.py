"""Import of float islands: ONNX nodes that stay float, into Relax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.relax.frontend.onnx import from_onnx

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.program.ops import FloatIsland

_TAKE = tvm.ir.Op.get("relax.take")


def import_model(model: ir.Model, where: str) -> tvm.IRModule:
    """Return the Relax module of a self-contained ONNX model with static shapes.

    Weights become constants; the parameters of ``main`` are the graph inputs, in order. Out-of-range indices
    of Gather are clamped, where TVM would read outside the table.

    Args:
        model: Valid ONNX (TVM does not validate).
        where: Names the model in errors.

    Returns:
        A module with ``main``, whose result is one tensor or a tuple of tensors, and the TensorIR functions
        that TVM's converters wrote for it.

    Raises:
        ToolchainError: TVM cannot import an operator (which one is named), or infers other output types.
    """
    proto = ir.to_proto(model)
    try:
        module = from_onnx(proto, keep_params_in_input=False)
    except Exception as error:  # TVM raises whatever its converter met
        what = f"TVM cannot import {_culprit(proto) or 'this part of the model'}: {_first_line(error)}"
        raise ToolchainError(what, where=where, fix="leave this part to ONNX Runtime") from error
    _check_outputs(module["main"], model, where)
    module["main"] = _Adopt(module, {}).visit_expr(module["main"])
    return module


def importable(island: FloatIsland) -> str | None:
    """Return why TVM cannot import the island, or None if it can."""
    try:
        import_model(island.model, island.name)
    except ToolchainError as error:
        return error.what
    return None


def output_types(function: Any) -> list[Any]:
    """Return the tensor types of a function's results."""
    result = function.body.body.ty
    return list(result.fields) if hasattr(result, "fields") else [result]


def _check_outputs(function: Any, model: ir.Model, where: str) -> None:
    found = output_types(function)
    for value, kind in zip(model.graph.outputs, found, strict=True):
        shape = [int(d) if isinstance(d, int) or hasattr(d, "value") else None for d in kind.shape or []]
        expected = None if value.shape is None else [int(d) for d in value.shape.numpy()]
        dtype = None if value.dtype is None else value.dtype.numpy().name
        if shape != expected or str(kind.dtype) != dtype:
            what = (
                f"TVM infers {kind.dtype}{shape} for output '{value.name}', the model says {dtype}{expected}"
            )
            raise ToolchainError(what, where=where, fix="leave this part to ONNX Runtime")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _culprit(proto: onnx.ModelProto) -> str | None:
    """Return name and operator of the first node that cannot be imported, by bisection over prefixes."""
    nodes = list(proto.graph.node)
    works, fails = 0, len(nodes)
    if not _prefix_fails(proto, nodes, fails):
        return None  # it fails at the graph's edge: an input, an initializer or an output
    while fails - works > 1:
        middle = (works + fails) // 2
        if _prefix_fails(proto, nodes, middle):
            fails = middle
        else:
            works = middle
    node = nodes[fails - 1]
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"node '{node.name or node.output[0]}' ({operator})"


def _prefix_fails(proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], count: int) -> bool:
    prefix = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
    prefix.graph.name = proto.graph.name
    prefix.graph.input.extend(proto.graph.input)
    prefix.graph.initializer.extend(proto.graph.initializer)
    prefix.graph.node.extend(nodes[:count])
    prefix.graph.output.extend(onnx.ValueInfoProto(name=name) for name in nodes[count - 1].output if name)
    try:
        from_onnx(prefix, keep_params_in_input=False)
    except Exception:  # any failure convicts
        return True
    return False


@mutator
class _Adopt(PyExprMutator):  # type: ignore[misc]
    """Renames called functions and makes table look-ups safe."""

    def __init__(self, module: tvm.IRModule, renamed: Mapping[str, Any]) -> None:
        super().__init__(module)
        self.renamed = renamed

    def visit_global_var_(self, variable: Any) -> Any:
        return self.renamed.get(variable.name_hint, variable)

    def visit_call_(self, call: Any) -> Any:
        call = self.visit_expr_post_order(call)
        if call.op == _TAKE and call.attrs.mode == "fast":
            return relax.op.take(*call.args, axis=call.attrs.axis, mode="clip")
        return call


def emit_copy(builder: relax.BlockBuilder, module: tvm.IRModule, arguments: Sequence[Any]) -> list[Any]:
    """Emit the bindings of the module's ``main`` into the function under construction.

    Args:
        builder: Inside a dataflow block.
        module: From ``import_model``; used once: its variables become the caller's.
        arguments: Values for its parameters.

    Returns:
        One expression for each result.
    """
    helpers = [(v.name_hint, f) for v, f in module.functions_items() if v.name_hint != "main"]
    renamed = {name: builder.add_func(function, f"island_{name}") for name, function in helpers}
    function = _Adopt(module, renamed).visit_expr(module["main"])
    bound = function.bind_params(dict(zip(function.params, arguments, strict=True)))
    for block in bound.body.blocks:
        for binding in block.bindings:
            builder.emit_normalized(binding)
    result = bound.body.body
    if not hasattr(result.ty, "fields"):
        return [result]
    return [builder.emit(relax.TupleGetItem(result, i)) for i in range(len(result.ty.fields))]
