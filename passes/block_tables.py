"""Store embedding tables in 8, 4, 3 or 2 bits with scales by group: com.microsoft.GatherBlockQuantized."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, constant_array, is_op, node_label
from bitwright.compiler.graph.operands import table_of, weight_array, weight_of
from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.passes.compact_weights import is_compact
from bitwright.passes.contract import PassResult
from bitwright.passes.pack_nbits import BITS, DOMAIN, PackNBits, pack
from bitwright.passes.rewriting import add_initializer, fresh_names, replace_node
from bitwright.passes.round_nearest import round_to_nearest
from bitwright.passes.stored_weights import explicit_zero_point, stored_type


@dataclass(frozen=True, eq=False)
class TiedTable:
    """A table in groups along its rows that products in other parts of the model multiply by, too.

    Attributes:
        name: Of the table.
        shape: Rows and columns.
        digest: SHA-256 of its float32 elements, row by row.
        quant: How it is stored.
    """

    name: str
    shape: tuple[int, int]
    digest: bytes
    quant: WeightQuant

    @classmethod
    def of(cls, name: str, table: np.ndarray, quant: WeightQuant) -> TiedTable:
        """Describe a float32 table."""
        rows, columns = table.shape
        return cls(name, (rows, columns), _digest(table), quant)

    def is_equal(self, table: np.ndarray) -> bool:
        """Tell whether these are its elements."""
        return table.shape == self.shape and _digest(table) == self.digest


def _digest(table: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(table, np.float32).data).digest()


@dataclass(frozen=True)
class BlockTables:
    """Rewrite ``Gather(float table)`` as one GatherBlockQuantized of a table in groups along its rows.

    No standard operator looks rows up in 4 bits. A product by the same table transposed (a tied output layer), and
    that the plan gives groups of the same kind, reads the one stored table: ``Transpose`` of integers, scales and
    zero points, then DequantizeLinear, which ONNX Runtime folds and fuses into MatMulNBits; where a table is stored as
    packed bytes, MatMulNBits reads these. To be run before the rounding passes, which then leave such a product alone.

    Attributes:
        plan: Names the tables and their scales.
        tied: Tables that are looked up in elsewhere, where the model is one part of a larger one.
    """

    plan: Plan
    tied: Sequence[TiedTable] = ()

    @property
    def name(self) -> str:
        """The pass's name."""
        return "block_tables"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model``, of an opset that holds 4-bit integers, in place."""
        edit = _Edit(model, self.plan, fresh_names(model))
        changed = sum(edit.rewrite(node) for node in list(model.graph)) + edit.read(self.tied)
        if changed:
            model.opset_imports.setdefault(DOMAIN, 1)
        return PassResult(model, changed, tuple(edit.notes))


@dataclass(frozen=True)
class _Table:
    """A stored table: integers [rows, columns], scales and zero points [rows, columns / group].

    Attributes:
        name: Of the float table.
        array: The float table.
        parts: What is stored.
        quant: How.
    """

    name: str
    array: np.ndarray
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
            array = constant_array(value)
            assert array is not None
            self.stored[value] = self._store(value.name or "table", array, quant)
            self._tie(self.stored[value])
        table = self.stored[value]
        bits = BITS[quant.dtype]
        attributes = {"block_size": quant.group, "quantize_axis": 1, "gather_axis": 0, "bits": bits}
        inputs = [table.parts[0], node.inputs[1], *table.parts[1:]]
        new = ir.node(
            "GatherBlockQuantized", inputs, attributes, domain=DOMAIN, name=node.name, num_outputs=1
        )
        replace_node(node, [new], list(new.outputs))
        return 1

    def read(self, tied: Sequence[TiedTable]) -> int:
        """Let products read tables of other parts, which are stored as they are there."""
        before = len(self.notes)
        for known in tied:
            for node in list(self.model.graph):
                array = _multiplied(node)
                # A product that was tied to a table of this model multiplies by no constant any more.
                if array is None or array.shape != known.shape or not self._same_groups(node, known.quant):
                    continue
                if known.is_equal(array):
                    self._tie(self._store(known.name, np.ascontiguousarray(array), known.quant))
        return len(self.notes) - before

    def _store(self, stem: str, array: np.ndarray, quant: WeightQuant) -> _Table:
        integers = round_to_nearest(array, quant)
        if _is_packed(quant):
            arrays = _packed(integers, quant)
        else:
            arrays = [integers.astype(stored_type(quant.dtype)), quant.scale]
            zero = explicit_zero_point(quant)
            if zero is not None:
                arrays.append(zero.astype(stored_type(quant.dtype)))
        graph, whats = self.model.graph, ("quantized", "scale", "zero_point")
        parts = [
            add_initializer(graph, self.names(f"{stem}_{w}"), a) for w, a in zip(whats, arrays, strict=False)
        ]
        return _Table(stem, array, tuple(parts), quant)

    def _tie(self, table: _Table) -> None:
        """Let products with the transposed table as weight, stored again or not, read the stored integers."""
        for node in list(self.model.graph):
            array = _multiplied(node)
            if array is None or array.shape != table.array.shape or not np.array_equal(array, table.array):
                continue
            if not self._same_groups(node, table.quant):
                continue
            if not _is_packed(table.quant):
                node.replace_input_with(1, self._transposed(table))
            elif is_op(node, "MatMul"):
                self._multiply_packed(node, table)
            else:
                continue
            self.notes.append(f"{node_label(node)} reads the table '{table.name}'")

    def _same_groups(self, node: ir.Node, table: WeightQuant) -> bool:
        decision = self.plan.nodes.get(node_label(node))
        quant = self.plan.weights.get(decision.weight) if decision and decision.weight else None
        return quant is not None and (quant.axis, quant.group, quant.dtype, quant.bits, quant.codebook) == (
            (0, table.group, table.dtype, table.bits, table.codebook)
        )

    def _multiply_packed(self, node: ir.Node, table: _Table) -> None:
        """Let a product read the packed table, whose rows are what MatMulNBits calls columns, in its own shape."""
        (rows, depth), group, bits = table.array.shape, table.quant.group, BITS[table.quant.dtype]
        shape = np.array([rows, -(-depth // group), group * bits // 8], np.int64)
        stem = f"{table.name}_blocks"
        reshape = ir.node(
            "Reshape",
            [table.parts[0], add_initializer(self.model.graph, self.names(f"{stem}_shape"), shape)],
            name=self.names(f"{stem}_Reshape"),
        )
        reshape.outputs[0].name = self.names(stem)
        attributes = {"K": depth, "N": rows, "bits": bits, "block_size": group}
        attributes["accuracy_level"] = PackNBits().accuracy_level
        inputs = [node.inputs[0], reshape.outputs[0], *table.parts[1:]]
        new = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name, num_outputs=1)
        replace_node(node, [reshape, new], list(new.outputs))

    def _transposed(self, table: _Table) -> ir.Value:
        """Return the dequantized transposed table; every reader gets nodes of its own, as runtimes fuse them."""
        turned = [
            self._node(ir.node("Transpose", [part], {"perm": [1, 0]}), f"{part.name}_transposed")
            for part in table.parts
        ]
        attributes = {"axis": 0, "block_size": table.quant.group}
        dequantize = self._node(ir.node("DequantizeLinear", turned, attributes), f"{table.name}_dequantized")
        self.model.graph.insert_before(next(iter(self.model.graph)), _makers([*turned, dequantize]))
        return dequantize

    def _node(self, node: ir.Node, name: str) -> ir.Value:
        node.name = self.names(f"{name}_{node.op_type}")
        output, source = node.outputs[0], node.inputs[0]
        output.name = self.names(name)
        assert source is not None and source.shape is not None
        if node.op_type == "DequantizeLinear":
            output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), source.shape
        else:
            output.type, output.shape = source.type, ir.Shape(list(source.shape)[::-1])
        return output


def _multiplied(node: ir.Node) -> np.ndarray | None:
    """Return the transposed constant that a product multiplies by: the rows of a table that it may share."""
    weight = weight_of(node) if is_op(node, "MatMul", "Gemm") else None
    return None if weight is None else weight_array(weight).T


def _is_packed(quant: WeightQuant) -> bool:
    """Tell whether a table is stored as packed bytes: there is no narrower type that all its readers take."""
    return BITS[quant.dtype] != 4 or is_compact(quant)


def _packed(integers: np.ndarray, quant: WeightQuant) -> list[np.ndarray]:
    """Return codes counted from the lowest, scales, and zero points if there are any, as their kernels read them."""
    bits = BITS[quant.dtype]
    offset = 0 if quant.dtype.startswith("u") else 2 ** (bits - 1)
    arrays = [pack((integers.astype(np.int16) + offset).astype(np.uint8), bits), quant.scale]
    if quant.zero_point is not None:
        arrays.append(pack((quant.zero_point.astype(np.int16) + offset).astype(np.uint8), bits))
    return arrays


def _makers(values: list[ir.Value]) -> list[ir.Node]:
    return [node for value in values if (node := value.producer()) is not None]
