"""Turn weights that are looked up in the NF4 table, and the product behind them, into com.microsoft.MatMulBnb4."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import FreshNames, constant_array, int_attribute, is_op
from bitwright.compiler.rounding.grid import codebook
from bitwright.passes.contract import PassResult
from bitwright.passes.pack_nbits import DOMAIN, plain_product
from bitwright.passes.rewriting import add_initializer, fresh_names, graph_of, replace_node

NF4 = 1  # the kernel's quant_type


@dataclass(frozen=True)
class PackBnb4:
    """Rewrite ``MatMul`` or ``Gemm`` of an NF4 weight, as rounding passes write it, as one MatMulBnb4.

    In its standard form a runtime widens the weight to float32 when it loads the model. A Gemm's bias becomes an
    Add. Products that share a weight share the packed one.
    """

    name: ClassVar[str] = "pack_bnb4"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        packer = _Packer(fresh_names(model))
        found = [(n, w) for g in model.graphs() for n in g if (w := _looked_up(n)) is not None]
        for node, weight in found:
            packer.rewrite(node, weight)
        if found:
            model.opset_imports.setdefault(DOMAIN, 1)
        return PassResult(model, len(found))


@dataclass(frozen=True)
class _LookedUp:
    """An NF4 weight: positions in the table [K / group, group, N] and scales [K / group, 1, N]."""

    indices: ir.Value
    scale: ir.Value


def _looked_up(node: ir.Node) -> _LookedUp | None:
    if not plain_product(node):
        return None
    chain = []
    value = node.inputs[1]
    for op_type, operand in (("Reshape", 0), ("Mul", 0), ("Gather", 1), ("Cast", 0)):
        source = value.producer() if value is not None else None
        if source is None or not is_op(source, op_type):
            return None
        chain.append(source)
        value = source.inputs[operand]
    indices, scale = value, chain[1].inputs[1]
    table, positions = constant_array(chain[2].inputs[0]), constant_array(indices)
    if indices is None or scale is None or positions is None or not _is_nf4(table):
        return None
    shape, blocks = constant_array(chain[0].inputs[1]), constant_array(scale)
    depth, columns = positions.shape[0] * positions.shape[1], positions.shape[-1]
    fits = (
        positions.ndim == 3
        and shape is not None
        and tuple(shape) == (depth, columns)
        and blocks is not None
        and blocks.shape == (positions.shape[0], 1, columns)
        and int_attribute(chain[2], "axis", 0) == 0
    )
    return _LookedUp(indices, scale) if fits else None


def _is_nf4(table: np.ndarray | None) -> bool:
    return table is not None and np.array_equal(table, codebook("nf4").values.astype(np.float32))


@dataclass
class _Packer:
    names: FreshNames
    done: dict[ir.Value, tuple[ir.Value, ir.Value]] = field(default_factory=dict)

    def rewrite(self, node: ir.Node, weight: _LookedUp) -> None:
        if weight.indices not in self.done:
            self.done[weight.indices] = self._pack(node, weight)
        blocks, group, columns = _shape(weight.indices)
        attributes = {"K": blocks * group, "N": columns, "block_size": group, "quant_type": NF4}
        inputs = [node.inputs[0], *self.done[weight.indices]]
        new = ir.node("MatMulBnb4", inputs, attributes, domain=DOMAIN, name=node.name, num_outputs=1)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is None:
            replace_node(node, [new], list(new.outputs))
            return
        product, old = new.outputs[0], node.outputs[0]
        product.name, product.type, product.shape = self.names(f"{old.name}_product"), old.type, old.shape
        add = ir.node("Add", [product, bias], name=self.names(f"{node.name}_bias"), num_outputs=1)
        replace_node(node, [new, add], list(add.outputs))

    def _pack(self, node: ir.Node, weight: _LookedUp) -> tuple[ir.Value, ir.Value]:
        positions, scale = constant_array(weight.indices), constant_array(weight.scale)
        assert positions is not None and scale is not None
        columns = positions.shape[-1]
        flat = positions.astype(np.uint8).reshape(-1, columns).T.reshape(-1)
        pairs = np.append(flat, np.zeros(flat.size % 2, np.uint8)).reshape(-1, 2)
        packed = (pairs[:, 0] << 4 | pairs[:, 1]).astype(np.uint8)  # the first in the higher half
        graph, stem = graph_of(node), weight.indices.name or "weight"
        return (
            add_initializer(graph, self.names(f"{stem}_packed"), packed),
            add_initializer(graph, self.names(f"{stem}_absmax"), scale[:, 0, :].T.reshape(-1)),
        )


def _shape(value: ir.Value) -> tuple[int, int, int]:
    array = constant_array(value)
    assert array is not None
    return array.shape[0], array.shape[1], array.shape[2]
