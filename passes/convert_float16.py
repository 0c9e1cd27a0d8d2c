"""Compute a 16-bit float model in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import STANDARD_DOMAINS, FreshNames, is_op, node_label
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import fresh_names

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")
NOTE = "16-bit floats are computed in float32; inputs and outputs keep their type"
KNOWN_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft", "ai.onnx.ml")


@dataclass(frozen=True)
class ConvertFloat16:
    """Make 16-bit weights, constants and values float32; inputs and outputs keep their type by a Cast.

    Weights keep their values exactly. Results differ from the 16-bit model's by that model's own rounding,
    which float32 does not do, and a value that overflowed to infinity no longer does.
    """

    name: ClassVar[str] = "convert_float16"

    def run(self, model: ir.Model) -> PassResult:
        """Convert.

        Raises:
            ModelError: A 16-bit value meets an operator of an unknown domain, which may accept nothing else.
        """
        if not _has_half(model):
            return PassResult(model, 0)
        _refuse_unknown_operators(model)
        names = fresh_names(model)
        for value in [v for v in (*model.graph.inputs, *model.graph.outputs) if v.dtype in HALF]:
            if value.producer() is None:
                _cast_input(model.graph, value, names)
            elif not _is_edge_cast(value):
                _cast_output(model.graph, value, names)
        edges = _edges(model)
        changed = sum(_widen_value(v) for v in _values(model) if v not in edges)
        changed += sum(_widen_attributes(n, edges) for g in model.graphs() for n in g)
        return PassResult(model, changed, (NOTE,))


def _edges(model: ir.Model) -> set[ir.Value]:
    """Return the values whose type the model's users see."""
    return {*model.graph.inputs, *model.graph.outputs}


def _has_half(model: ir.Model) -> bool:
    edges = _edges(model)
    inside = any(v.dtype in HALF or _is_half_constant(v) for v in _values(model) if v not in edges)
    nodes = [node for graph in model.graphs() for node in graph]
    return inside or any(_half_attributes(node, edges) for node in nodes) or any(map(_reads_half_edge, nodes))


def _reads_half_edge(node: ir.Node) -> bool:
    """Tell whether a node other than the Cast at the edge reads a 16-bit value."""
    return not is_op(node, "Cast") and any(v is not None and v.dtype in HALF for v in node.inputs)


def _values(model: ir.Model) -> list[ir.Value]:
    found: dict[ir.Value, None] = {}
    for graph in model.graphs():
        outputs = [o for n in graph for o in n.outputs]
        found.update(dict.fromkeys([*graph.inputs, *graph.initializers.values(), *outputs]))
    return list(found)


def _is_half_constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.dtype in HALF


def _refuse_unknown_operators(model: ir.Model) -> None:
    for graph in model.graphs():
        for node in graph:
            touched = [v for v in [*node.inputs, *node.outputs] if v is not None and v.dtype in HALF]
            if node.domain not in KNOWN_DOMAINS and touched:
                operator = f"{node.domain}.{node.op_type}"
                msg = f"operator {operator} works on 16-bit floats and may not accept float32"
                raise ModelError(
                    msg,
                    where=f"node '{node_label(node)}'",
                    fix="export the model in float32",
                )


def _cast_input(graph: ir.Graph, value: ir.Value, names: FreshNames) -> None:
    """Put ``Cast(value, to=float32)`` between a graph input and its readers."""
    if not value.uses():
        return
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=names(f"{value.name}_to_float32"))
    out = cast.outputs[0]
    out.name, out.dtype, out.shape = names(f"{value.name}_float32"), ir.DataType.FLOAT, value.shape
    for use in [u for u in value.uses() if u.node is not cast]:
        use.node.replace_input_with(use.idx, out)
    first = next(iter(graph), None)
    assert first is not None, "an input with readers is in a graph with nodes"
    graph.insert_before(first, cast)


def _cast_output(graph: ir.Graph, value: ir.Value, names: FreshNames) -> None:
    """Let the producer write float32 under a new name and cast it to the output's own name and type."""
    dtype = value.dtype
    assert dtype is not None, "only 16-bit outputs are cast"
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=names(f"{value.name}_from_float32"))
    out = cast.outputs[0]
    name = value.name
    value.name = names(f"{name}_float32")
    out.name, out.dtype, out.shape = name, dtype, value.shape
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = out
    graph.append(cast)


def _is_edge_cast(value: ir.Value) -> bool:
    """Tell whether the output already comes from a Cast of a float32 value."""
    node = value.producer()
    source = node.inputs[0] if node is not None and is_op(node, "Cast") else None
    return source is not None and source.dtype == ir.DataType.FLOAT and not value.uses()


def _widen_value(value: ir.Value) -> bool:
    changed = False
    if _is_half_constant(value) and value.producer() is None:
        assert value.const_value is not None
        value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
        changed = True
    if value.dtype in HALF:
        # Setting the dtype would change the type object, which a copied model shares with the original.
        value.type = ir.TensorType(ir.DataType.FLOAT)
        changed = True
    return changed


def _half_attributes(node: ir.Node, edges: set[ir.Value]) -> list[ir.Attr]:
    """Return the attributes that hold a 16-bit tensor or name a 16-bit type, edge Casts excepted."""
    if is_op(node, "Cast") and node.outputs[0] in edges:
        return []
    return [a for a in node.attributes.values() if _is_half_attribute(a)]


def _is_half_attribute(attribute: ir.Attr) -> bool:
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().dtype in HALF
    is_type = attribute.type == ir.AttributeType.INT and attribute.name in TYPE_ATTRIBUTES
    return is_type and attribute.as_int() in [int(t) for t in HALF]


def _widen_attributes(node: ir.Node, edges: set[ir.Value]) -> bool:
    found = _half_attributes(node, edges)
    for attribute in found:
        if attribute.type == ir.AttributeType.TENSOR:
            wide = ir.Tensor(
                attribute.as_tensor().numpy().astype(np.float32), name=attribute.as_tensor().name
            )
            node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)
        else:
            node.attributes[attribute.name] = ir.AttrInt64(attribute.name, int(ir.DataType.FLOAT))
    return bool(found)
