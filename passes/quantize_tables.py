"""Store embedding tables in integers: look the row up first, dequantize what was looked up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, constant_array, node_label
from bitwright.compiler.graph.operands import table_of
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer
from bitwright.passes.round_nearest import round_to_nearest
from bitwright.passes.stored_weights import FLOAT_TYPES, stored_type


@dataclass(frozen=True)
class QuantizeTables:
    """Rewrite ``Gather(float table)`` as ``DequantizeLinear(Gather(int8 table))``, one scale a column.

    A DequantizeLinear in front of the Gather would dequantize the whole table on every call. A table in half
    precision gets a Cast in its place. Tables in groups are block_tables' work.

    Attributes:
        plan: Names the tables and their scales.
    """

    plan: Plan

    @property
    def name(self) -> str:
        """The pass's name."""
        return "quantize_tables"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        fresh = FreshNames(model)
        stored: dict[str, ir.Value] = {}
        changed = 0
        for node in list(model.graph):
            decision = self.plan.nodes.get(node_label(node))
            table = constant_array(table_of(node))
            if decision is None or decision.role != "table" or not decision.weight or table is None:
                continue
            quant = self.plan.weights[decision.weight]
            if quant.group:
                continue
            if decision.weight not in stored:
                integers = round_to_nearest(table, quant).astype(stored_type(quant.dtype), copy=False)
                stored[decision.weight] = add_initializer(
                    model.graph, fresh(f"{_stem(node)}_quantized"), integers
                )
            _rewrite(model, node, stored[decision.weight], quant, fresh)
            changed += 1
        return PassResult(model, changed)


def _stem(node: ir.Node) -> str:
    table = node.inputs[0]
    return (table.name if table is not None else None) or "table"


def _rewrite(model: ir.Model, node: ir.Node, table: ir.Value, quant: WeightQuant, fresh: FreshNames) -> None:
    output = node.outputs[0]
    node.replace_input_with(0, table)
    rows = ir.Value(
        name=fresh(f"{output.name}_quantized"), type=ir.TensorType(table.dtype or ir.DataType.INT8)
    )
    rows.shape = output.shape
    lookup = ir.Node(
        "", "Gather", list(node.inputs), [ir.AttrInt64("axis", 0)], outputs=[rows], name=node.name
    )
    back = _widened(model, rows, table, quant, fresh)
    result = back.outputs[0]
    result.dtype, result.shape = ir.DataType.FLOAT, output.shape
    model.graph.insert_before(node, [lookup, back])
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    name = output.name
    model.graph.remove(node, safe=True)
    result.name = name


def _widened(
    model: ir.Model, rows: ir.Value, table: ir.Value, quant: WeightQuant, fresh: FreshNames
) -> ir.Node:
    """Return the node that turns looked-up rows into float32."""
    stem = (table.name or "table").removesuffix("_quantized")
    if quant.dtype in FLOAT_TYPES:
        to = ir.AttrInt64("to", ir.DataType.FLOAT.value)
        return ir.Node("", "Cast", [rows], [to], num_outputs=1, name=fresh(f"{stem}_Cast"))
    per_tensor = quant.axis is None
    scale = (quant.scale.reshape(()) if per_tensor else quant.scale).astype(np.float32)
    parameters = [
        add_initializer(model.graph, fresh(f"{stem}_scale"), scale),
        add_initializer(model.graph, fresh(f"{stem}_zero_point"), np.zeros(scale.shape, quant.dtype)),
    ]
    attributes = [] if per_tensor else [ir.AttrInt64("axis", -1)]
    name = fresh(f"{stem}_DequantizeLinear")
    return ir.Node("", "DequantizeLinear", [rows, *parameters], attributes, num_outputs=1, name=name)
