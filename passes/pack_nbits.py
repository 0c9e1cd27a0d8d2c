"""Turn blocked weights and the product behind them into com.microsoft.MatMulNBits."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import (
    FreshNames,
    constant_array,
    consumers,
    int_attribute,
    is_op,
    rank,
    static_shape,
)
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, graph_of, replace_node

DOMAIN = "com.microsoft"
BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
SMALLEST_BLOCK = 16
# ONNX Runtime's own fusion transposes packed 2-bit weights as if every row began with a new byte: with another number
# of columns it computes wrong results (1.31.1). It also fuses no weight that two products read.
COLUMNS_OF_TWO_BITS = 4


@dataclass(frozen=True)
class PackNBits:
    """Rewrite ``MatMul`` or ``Gemm`` of a blocked DequantizeLinear as one MatMulNBits with packed weights.

    ONNX Runtime fuses the standard form itself, save where a weight has several readers and where 2-bit weights
    have a number of columns that is no multiple of 4; there it must be written out. Products that share a weight
    share the packed one.

    Attributes:
        everywhere: Also rewrite what ONNX Runtime would fuse.
        accuracy_level: 4 lets the kernel round activations to 8 bits in blocks; 0 forbids it.
    """

    everywhere: bool = False
    accuracy_level: int = 4

    @property
    def name(self) -> str:
        """The pass's name."""
        return "pack_nbits"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        packer = _Packer(fresh_names(model), self.accuracy_level)
        found = [n for g in model.graphs() for n in g if _fits(n)]
        todo = [n for n in found if self.everywhere or not is_fused(_dequantize(n))]
        for node in todo:
            packer.rewrite(node)
        if todo:
            model.opset_imports.setdefault(DOMAIN, 1)
        return PassResult(model, len(todo))


def is_fused(dequantize: ir.Node) -> bool:
    """Tell whether ONNX Runtime makes one correct MatMulNBits of a blocked DequantizeLinear and its reader."""
    weight = dequantize.inputs[0]
    columns = (static_shape(weight) or (0, 0))[1]
    assert weight is not None
    if len(consumers(dequantize.outputs[0])) > 1 or len(consumers(weight)) > 1:
        return False
    two_bits = weight.dtype is not None and BITS[_type_name(weight)] == 2
    return not two_bits or columns % COLUMNS_OF_TWO_BITS == 0


def _type_name(value: ir.Value) -> str:
    return value.dtype.name.lower() if value.dtype is not None else ""


def _dequantize(node: ir.Node) -> ir.Node:
    source = node.inputs[1].producer() if node.inputs[1] is not None else None
    assert source is not None, "only products of a dequantized weight are looked at"
    return source


def _fits(node: ir.Node) -> bool:
    """Tell whether the weight of a product is a constant matrix in blocks that the kernel takes."""
    source = node.inputs[1].producer() if plain_product(node) and node.inputs[1] is not None else None
    if source is None or not is_op(source, "DequantizeLinear"):
        return False
    weight, block = source.inputs[0], int_attribute(source, "block_size", 0)
    return (
        weight is not None
        and _type_name(weight) in BITS
        and rank(weight) == 2
        and int_attribute(source, "axis", 1) in (0, -2)
        and block >= SMALLEST_BLOCK
        and block & (block - 1) == 0
        and all(constant_array(v) is not None for v in source.inputs if v is not None)
    )


def plain_product(node: ir.Node) -> bool:
    """Tell whether a node is a MatMul, or a Gemm that is a product plus at most one bias a column."""
    if not is_op(node, "Gemm"):
        return is_op(node, "MatMul")
    bias = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    absent = len(node.inputs) < 3 or node.inputs[2] is None
    return (
        node.attributes.get_float("alpha", 1.0) == 1.0
        and node.attributes.get_float("beta", 1.0) == 1.0
        and not int_attribute(node, "transA", 0)
        and not int_attribute(node, "transB", 0)
        and (absent or (bias is not None and bias.ndim == 1))
    )


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Return unsigned integers packed along the last axis, the first in the lowest bits; padded with zeros.

    Args:
        values: Integers in ``[0, 2**bits)``.
        bits: 2, 4 or 8.

    Returns:
        uint8, the last axis divided by ``8 / bits`` (rounded up).
    """
    each = 8 // bits
    missing = -values.shape[-1] % each
    padded = np.pad(values.astype(np.uint8), [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    parts = padded.reshape(*padded.shape[:-1], -1, each) << (np.arange(each, dtype=np.uint8) * bits)
    packed: np.ndarray = np.bitwise_or.reduce(parts, axis=-1)
    return packed.astype(np.uint8)


@dataclass(frozen=True)
class _Packed:
    """The inputs that MatMulNBits has for one weight, and its attributes."""

    inputs: tuple[ir.Value, ir.Value, ir.Value | None]
    attributes: dict[str, int]


@dataclass
class _Packer:
    names: FreshNames
    accuracy_level: int
    done: dict[tuple[ir.Value | None, ...], _Packed] = field(default_factory=dict)

    def rewrite(self, node: ir.Node) -> None:
        packed = self._packed(_dequantize(node))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        inputs = [node.inputs[0], *packed.inputs, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes = packed.attributes | {"accuracy_level": self.accuracy_level}
        new = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=node.name, num_outputs=1)
        replace_node(node, [new], list(new.outputs))

    def _packed(self, source: ir.Node) -> _Packed:
        key = (*source.inputs, *([None] * (3 - len(source.inputs))))
        if key not in self.done:
            self.done[key] = self._pack(source)
        return self.done[key]

    def _pack(self, source: ir.Node) -> _Packed:
        weight, scale, zero = (*source.inputs, None)[:3]
        assert weight is not None and scale is not None
        bits, block = BITS[_type_name(weight)], int_attribute(source, "block_size", 0)
        scales = constant_array(scale)
        assert scales is not None
        integers, zeros = _unsigned(weight, zero, bits, scales.shape)
        depth, columns = integers.shape
        blocks = -(-depth // block)
        rows = np.zeros((columns, blocks * block), np.uint8)
        rows[:, :depth] = integers.T
        graph, stem = graph_of(source), weight.name or "weight"
        inputs = (
            add_initializer(
                graph, self.names(f"{stem}_packed"), pack(rows.reshape(columns, blocks, block), bits)
            ),
            add_initializer(graph, self.names(f"{stem}_packed_scale"), scales.T),
            None
            if zeros is None
            else add_initializer(graph, self.names(f"{stem}_packed_zero_point"), pack(zeros.T, bits)),
        )
        return _Packed(inputs, {"K": depth, "N": columns, "bits": bits, "block_size": block})


def _unsigned(
    weight: ir.Value, zero: ir.Value | None, bits: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return integers counted from the lowest, and their zero points unless all are the middle."""
    integers, zeros = constant_array(weight), constant_array(zero)
    assert integers is not None
    middle = 2 ** (bits - 1)
    offset = 0 if _type_name(weight).startswith("u") else middle
    zeros = np.zeros(shape, np.int16) if zeros is None else zeros.astype(np.int16)
    raised = (integers.astype(np.int16) + offset).astype(np.uint8)
    lifted = (zeros + offset).astype(np.uint8)
    return raised, None if (lifted == middle).all() else lifted
