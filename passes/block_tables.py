"""Store embedding tables in 4 bits with scales by group: com.microsoft.GatherBlockQuantized."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, constant_array, ints_attribute, is_op, node_label
from bitwright.compiler.graph.operands import table_of
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.passes.contract import PassResult
from bitwright.passes.pack_nbits import DOMAIN
from bitwright.passes.rewriting import add_initializer, fresh_names, replace_node
from bitwright.passes.round_nearest import round_to_nearest
from bitwright.passes.stored_weights import explicit_zero_point, stored_type


@dataclass(frozen=True)
class BlockTables:
    """Rewrite ``Gather(float table)`` as one GatherBlockQuantized of a table in groups along its rows.

    No standard operator looks rows up in 4 bits. A product that reads the same table through a Transpose, and that
    the plan gives groups of the same kind, reads the one stored table: ``Transpose`` of integers, scales and zero
    points, then DequantizeLinear, which ONNX Runtime folds and fuses into MatMulNBits. To be run before the rounding
    passes, which then leave such a product alone.

    Attributes:
        plan: Names the tables and their scales.
    """

    plan: Plan

    @property
    def name(self) -> str:
        """The pass's name."""
        return "block_tables"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``, of an opset that holds 4-bit integers, in place."""
        edit = _Edit(model, self.plan, fresh_names(model))
        changed = sum(edit.rewrite(node) for node in list(model.graph))
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
        return PassResult(model, changed, tuple(edit.notes))


@dataclass(frozen=True)
class _Table:
    """A stored table: integers [rows, columns], scales and zero points [rows, columns / group]."""

    parts: tuple[ir.Value, ...]
    quant: WeightQuant


@dataclass
class _Edit:
    model: ir.Model
    plan: Plan
    names: FreshNames
    stored: dict[ir.Value, _Table] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rewrite(self, node: ir.Node) -> int:
        decision = self.plan.nodes.get(node_label(node))
        value = table_of(node)
        quant = self.plan.weights.get(decision.weight) if decision and decision.role == "table" else None
        if value is None or quant is None or not quant.group:
            return 0
        if value not in self.stored:
            self.stored[value] = self._store(value, quant)
            self._tie(value)
        table = self.stored[value]
        attributes = {"block_size": quant.group, "quantize_axis": 1, "gather_axis": 0, "bits": quant.bits}
        inputs = [table.parts[0], node.inputs[1], *table.parts[1:]]
        new = ir.node(
            "GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=node.name, num_outputs=1
        )
        replace_node(node, [new], list(new.outputs))
        return 1

    def _store(self, value: ir.Value, quant: WeightQuant) -> _Table:
        array = constant_array(value)
        assert array is not None
        arrays = [round_to_nearest(array, quant).astype(stored_type(quant.dtype)), quant.scale]
        zero = explicit_zero_point(quant)
        if zero is not None:
            arrays.append(zero.astype(stored_type(quant.dtype)))
        stem, graph = value.name or "table", self.model.graph
        whats = ("quantized", "scale", "zero_point")
        parts = [
            add_initializer(graph, self.names(f"{stem}_{w}"), a) for w, a in zip(whats, arrays, strict=False)
        ]
        return _Table(tuple(parts), quant)

    def _tie(self, value: ir.Value) -> None:
        """Let products that read the table through a Transpose read the stored integers."""
        for transpose in [u.node for u in value.uses() if is_op(u.node, "Transpose")]:
            readers = [u.node for u in transpose.outputs[0].uses()]
            if not readers or not all(
                self._same_groups(n, transpose, self.stored[value].quant) for n in readers
            ):
                continue
            for reader in readers:
                reader.replace_input_with(1, self._transposed(value, transpose))
                self.notes.append(f"{node_label(reader)} reads the 4-bit table '{value.name}'")

    def _same_groups(self, node: ir.Node, transpose: ir.Node, table: WeightQuant) -> bool:
        decision = self.plan.nodes.get(node_label(node))
        quant = self.plan.weights.get(decision.weight) if decision and decision.weight else None
        return (
            quant is not None
            and is_op(node, "MatMul", "Gemm")
            and node.inputs[1] is transpose.outputs[0]
            and ints_attribute(transpose, "perm", (1, 0)) == (1, 0)
            and (quant.axis, quant.group, quant.dtype, quant.bits, quant.codebook)
            == (0, table.group, table.dtype, table.bits, table.codebook)
        )

    def _transposed(self, value: ir.Value, before: ir.Node) -> ir.Value:
        table, stem = self.stored[value], value.name or "table"
        turned = [
            self._insert(ir.node("Transpose", [part], {"perm": [1, 0]}), before, f"{part.name}_transposed")
            for part in table.parts
        ]
        attributes = {"axis": 0, "block_size": table.quant.group}
        dequantize = ir.node("DequantizeLinear", turned, attributes)
        return self._insert(dequantize, before, f"{stem}_dequantized")

    def _insert(self, node: ir.Node, before: ir.Node, name: str) -> ir.Value:
        node.name = self.names(f"{name}_{node.op_type}")
        output, source = node.outputs[0], node.inputs[0]
        output.name = self.names(name)
        is_float = node.op_type == "DequantizeLinear"
        assert source is not None and source.shape is not None
        output.type = ir.TensorType(ir.DataType.FLOAT) if is_float else source.type
        output.shape = source.shape if is_float else ir.Shape(list(source.shape)[::-1])
        self.model.graph.insert_before(before, node)
        return output
