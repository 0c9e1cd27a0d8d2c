"""Store packed weights in fewer bytes than their kernels read; a runtime unpacks them once, when it loads the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, int_attribute, is_op
from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.plan.scale_storage import as_bfloat16, super_scales
from bitwright.compiler.plan.weights import PLANES
from bitwright.passes.contract import PassResult
from bitwright.passes.pack_nbits import DOMAIN
from bitwright.passes.rewriting import add_initializer, fresh_names

_Maker = Callable[[str, np.ndarray], "ir.Value | None"]

# Inputs (weights, scales, zero points) of the operators that read packed weights.
OPERANDS = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
# Two codes of 3 bits in a byte, each in four bits: the lower two bits of both, and the third of both.
LOW, HIGH = 0x33, 0x44
# A symmetric code counts from 8; in three bits it counts from 4.
MIDDLE = 4


def is_compact(quant: WeightQuant) -> bool:
    """Tell whether the file holds a weight in another form than its kernel reads."""
    return bool(quant.group) and (quant.scale_storage != "float32" or quant.bits == PLANES)


@dataclass(frozen=True)
class CompactWeights:
    """Write scales and 3-bit codes of packed weights as small constants and the operators that widen them.

    Operators on constants are folded by every runtime that loads the model: what is computed, and how fast, stays the
    same. Scales that are values of bfloat16 become ``Cast``, those that are integers times units (see
    :mod:`bitwright.compiler.plan.scale_storage`) ``Mul(Cast, Cast)``; codes of 4 bits of which none needs the highest
    become planes of 2 bits and of 1 bit, put together by shifts.
    """

    name: ClassVar[str] = "compact_weights"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        compactor = _Compactor(model)
        nodes = [n for n in model.graph if n.domain == DOMAIN and n.op_type in OPERANDS]
        return PassResult(model, sum(compactor.rewrite(node) for node in nodes))


@dataclass
class _Compactor:
    model: ir.Model
    done: dict[ir.Value, ir.Value | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = fresh_names(self.model)

    def rewrite(self, node: ir.Node) -> bool:
        weight, scale, zero = OPERANDS[node.op_type]
        changed = self._codes(node, weight, scale, zero)
        return self._replace(node, scale, self._scales) or changed

    def _replace(self, node: ir.Node, index: int, make: _Maker) -> bool:
        """Let a node read what is made of a constant operand, once for all of its readers."""
        node, index = _read_by(node, index)
        value = node.inputs[index]
        array = constant_array(value)
        if value is None or array is None or value.producer() is not None:
            return False
        if value not in self.done:
            self.done[value] = make(value.name or "weight", array)
        made = self.done[value]
        if made is not None:
            node.replace_input_with(index, made)
        return made is not None

    def _scales(self, stem: str, array: np.ndarray) -> ir.Value | None:
        narrow = ir.DataType.BFLOAT16.numpy()
        if np.array_equal(as_bfloat16(array), array):
            return self._widened(self._constant(f"{stem}_bfloat16", array.astype(narrow)))
        if not (array > 0).all():
            return None
        parts = super_scales(array)
        if parts.integers.shape[-1] == 1 or not np.array_equal(parts.scales(), array):
            return None
        units = self._widened(self._constant(f"{stem}_units", parts.units.astype(narrow)))
        integers = self._widened(self._constant(f"{stem}_integers", parts.integers))
        shape = self._constant(f"{stem}_shape", np.array(array.shape, np.int64))
        return self._node("Reshape", self._node("Mul", integers, units), shape)

    def _widened(self, value: ir.Value) -> ir.Value:
        return self._node("Cast", value, to=ir.DataType.FLOAT.value)

    def _codes(self, node: ir.Node, weight: int, scale: int, zero: int) -> bool:
        """Store codes that need three bits only in planes."""
        base, scales = lowest_of_three_bits(node), constant_array(node.inputs[scale])
        if base is None or scales is None:
            return False
        if not self._replace(
            node, weight, lambda stem, packed: self._planes(stem, packed - np.uint8(17 * base))
        ):
            return False
        symmetric = len(node.inputs) <= zero or node.inputs[zero] is None
        if symmetric:
            count = scales.shape[0], (scales.shape[1] + 1) // 2
            node.resize_inputs(max(len(node.inputs), zero + 1))
            node.replace_input_with(zero, self._middles(count))
        return True

    def _planes(self, stem: str, packed: np.ndarray) -> ir.Value:
        half, quarter = packed.shape[-1] // 2, packed.shape[-1] // 4
        low = (packed[..., :half] & LOW) | ((packed[..., half:] & LOW) << 2)
        high = np.zeros((*packed.shape[:-1], quarter), np.uint8)
        for k in range(4):
            part = packed[..., k * quarter : (k + 1) * quarter] & HIGH
            high |= (part >> 2) << k
        lows, highs = self._constant(f"{stem}_2_bits", low), self._constant(f"{stem}_1_bit", high)
        halves = [self._masked(self._shifted(lows, 2 * k), LOW) for k in range(2)]
        quarters = [self._masked(self._shifted(highs, k - 2), HIGH) for k in range(4)]
        return self._node(
            "BitwiseOr", self._node("Concat", *halves, axis=-1), self._node("Concat", *quarters, axis=-1)
        )

    def _shifted(self, value: ir.Value, right: int) -> ir.Value:
        if right == 0:
            return value
        by = self._constant("shift", np.array(abs(right), np.uint8))
        return self._node("BitShift", value, by, direction="RIGHT" if right > 0 else "LEFT")

    def _masked(self, value: ir.Value, mask: int) -> ir.Value:
        return self._node("BitwiseAnd", value, self._constant("mask", np.array(mask, np.uint8)))

    def _middles(self, shape: tuple[int, int]) -> ir.Value:
        """Return packed zero points that are all the middle of three bits."""
        both = self._constant("middles", np.array(17 * MIDDLE, np.uint8))
        return self._node("Expand", both, self._constant("middles_shape", np.array(shape, np.int64)))

    def _constant(self, stem: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self.model.graph, self.names(stem), array)

    def _node(self, op_type: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
        """Add a node that reads constants, in front of all that read them."""
        stem = inputs[0].name
        node = ir.node(op_type, list(inputs), attributes, name=self.names(f"{stem}_{op_type}"))
        output = node.outputs[0]
        output.name = self.names(f"{stem}_{op_type}_out")
        made_here = [p for v in inputs if (p := v.producer()) is not None]
        places = {n: k for k, n in enumerate(self.model.graph)} if len(made_here) > 1 else {}
        if made_here:
            self.model.graph.insert_after(max(made_here, key=lambda n: places.get(n, 0)), node)
        else:
            self.model.graph.insert_before(next(iter(self.model.graph)), node)
        return output


def lowest_of_three_bits(node: ir.Node) -> int | None:
    """Return the lowest code of a packed weight whose codes, of 4 bits, need three only; None of other weights.

    Args:
        node: An operator of :data:`OPERANDS`.
    """
    weight, _, zero = OPERANDS[node.op_type]
    reader, index = _read_by(node, weight)
    array = constant_array(reader.inputs[index])
    if array is None or int_attribute(node, "bits", 4) != 4 or array.shape[-1] % 4:
        return None
    base = MIDDLE if len(node.inputs) <= zero or node.inputs[zero] is None else 0
    codes = np.stack([array & 15, array >> 4])
    return base if codes.min() >= base and codes.max() <= base + 7 else None


def _read_by(node: ir.Node, index: int) -> tuple[ir.Node, int]:
    """Return the node and operand that read the stored bytes: those of a Reshape if one stands between."""
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    return (producer, 0) if producer is not None and is_op(producer, "Reshape") else (node, index)
