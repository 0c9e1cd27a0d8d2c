"""Rotary positions: which value is rotated, and the frequencies in the tables or arithmetic behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import STANDARD_DOMAINS, constant_array
from bitwright.compiler.llama.following import (
    CONTRIB,
    FIX,
    expect,
    made_by,
    numbers,
    refuse,
    through,
    with_constant,
)

MOVES = ("Slice", "Gather", "Unsqueeze", "Squeeze", "Cast", "Expand", "Reshape", "Identity")
OPERATOR = "RotaryEmbedding"
FREQUENCY_TOLERANCE = 2e-4
BASE_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class Rotation:
    """A value and what it is rotated by.

    Attributes:
        data: The value before, shape (batch, heads, length, width).
        cos: Cosines, as the product or the operator reads them.
        sin: Sines.
        halves: They hold each frequency once, not twice.
        heads: Number of heads, where an operator says it.
    """

    data: ir.Value
    cos: ir.Value
    sin: ir.Value
    halves: bool = False
    heads: int | None = None


@dataclass(frozen=True, eq=False)
class Frequencies:
    """Angles by position.

    Attributes:
        inverse: Angle of position 1 for each pair of elements, float64, shape (width / 2,).
        positions: Positions that a table holds, or None if the angles are computed.
    """

    inverse: NDArray[np.float64]
    positions: int | None

    @property
    def base(self) -> float:
        """The number whose powers the frequencies are (rope theta), from the usual ratio of neighbours."""
        if len(self.inverse) < 2:
            return 10000.0
        # Where all or some of them are slowed by a factor, the ratio of most neighbours is still that of the powers.
        found = float(np.median(self.inverse[1:] / self.inverse[:-1]) ** -len(self.inverse))
        # Tables are float32; the number that made them is a whole one.
        return float(round(found)) if abs(found - round(found)) < BASE_TOLERANCE * found else found

    def factors(self) -> NDArray[np.float32] | None:
        """Return what the pure powers of the base are divided by, or None if they are all 1."""
        pure = self.base ** -(np.arange(len(self.inverse)) / len(self.inverse))
        factors = pure / self.inverse
        return None if np.allclose(factors, 1.0, rtol=1e-2) else factors.astype(np.float32)


def rotation(value: ir.Value | None) -> Rotation:
    """Return the rotation that makes a value: ``x * cos + concat(-x2, x1) * sin``, or an operator for it.

    Raises:
        ModelError: Something else makes it.
    """
    operator = _operator(value)
    if operator is not None:
        return operator
    node = expect(through(value, "Cast"), "a rotary embedding (x * cos + rotated x * sin)", "Add")
    products = [made_by(v, "Mul") for v in node.inputs]
    for straight, turned in (products, products[::-1]):
        if straight is None or turned is None:
            continue
        for rotated, sin in _orders(turned):
            data = _halves_swapped(rotated)
            for same, cos in _orders(straight):
                if data is not None and same is data:
                    return Rotation(data, cos, sin)
    return refuse("a rotary embedding of half rotations (x * cos + concat(-x2, x1) * sin)", value)


def _operator(value: ir.Value | None) -> Rotation | None:
    """Return the rotation of a RotaryEmbedding, whose tables come third with ONNX Runtime, second in opset 23."""
    value = through(value, "Cast")
    node = None if value is None else value.producer()
    if node is None or node.op_type != OPERATOR or node.domain not in (*STANDARD_DOMAINS, CONTRIB):
        return None
    first = 2 if node.domain == CONTRIB else 1
    data, cos, sin = node.inputs[0], node.inputs[first], node.inputs[first + 1]
    turned_otherwise = (
        node.attributes.get_int("interleaved", 0) or node.attributes.get_float("scale", 1.0) != 1.0
    )
    if turned_otherwise or data is None or cos is None or sin is None:
        return refuse("a rotary embedding of half rotations of whole heads", value)
    return Rotation(data, cos, sin, halves=True, heads=node.attributes.get_int("num_heads", 0) or None)


def _orders(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    first, second = node.inputs
    assert first is not None and second is not None, "a product has two operands"
    return [(first, second), (second, first)]


def _halves_swapped(value: ir.Value) -> ir.Value | None:
    """Return x if a value is concat(-second half of x, first half of x)."""
    node = made_by(value, "Concat")
    if node is None or len(node.inputs) != 2:
        return None
    negated = made_by(node.inputs[0], "Neg")
    if negated is None:
        return None
    second, first = _half(negated.inputs[0]), _half(node.inputs[1])
    if second is None or first is None or second[0] is not first[0]:
        return None
    return first[0] if (first[1], second[1]) == (False, True) else None


def _half(value: ir.Value | None) -> tuple[ir.Value, bool] | None:
    """Return what a value is half of, and whether it is the second half."""
    node = made_by(value, "Split")
    if node is not None and len(node.outputs) == 2 and node.inputs[0] is not None:
        return node.inputs[0], node.outputs[1] is value
    node = made_by(value, "Slice")
    if node is None or node.inputs[0] is None:
        return None
    starts = numbers(node.inputs[1])
    step = numbers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else (1,)
    return (node.inputs[0], starts != (0,)) if starts is not None and step == (1,) else None


def frequencies(found: Rotation) -> Frequencies:
    """Return the frequencies behind a rotation.

    Raises:
        ModelError: They are neither in constant tables nor computed from a constant vector.
    """
    cos, sin = source_of(found.cos, "Cos"), source_of(found.sin, "Sin")
    tables = constant_array(cos), constant_array(sin)
    if tables[0] is not None and tables[1] is not None:
        return _from_tables(tables[0], tables[1], found)
    node = expect(cos, "a cosine table, or Cos of positions times frequencies", "Cos")
    return Frequencies(_vector(node.inputs[0], found.cos), None)


def source_of(value: ir.Value | None, function: str) -> ir.Value | None:
    """Follow a table through slicing and scaling by one, up to a constant or the function."""
    while value is not None:
        moved = through(value, *MOVES)
        node = made_by(moved, "Mul")
        split = None if node is None else with_constant(node)
        if split is not None and split[1].size == 1 and np.isclose(float(split[1].reshape(())), 1.0):
            value = split[0]
            continue
        return moved
    return None


def _from_tables(cos: np.ndarray, sin: np.ndarray, found: Rotation) -> Frequencies:
    cos, sin = (t.reshape(-1, t.shape[-1]).astype(np.float64) for t in (cos, sin))
    half = cos.shape[1] if found.halves else cos.shape[1] // 2
    twice = found.halves or np.array_equal(cos[:, :half], cos[:, half:])
    if cos.shape != sin.shape or len(cos) < 2 or not half or not twice:
        refuse("tables of cosines and sines, each frequency twice", found.cos)
    inverse = np.arctan2(sin[1, :half], cos[1, :half])
    positions = np.arange(min(len(cos), 64))[:, None]
    if (
        not np.allclose(cos[: len(positions), :half], np.cos(positions * inverse), atol=1e-4)
        or (inverse <= 0).any()
    ):
        refuse("a table of positions times constant frequencies", found.cos)
    return Frequencies(_refined(cos[:, :half], sin[:, :half], inverse), len(cos))


def _refined(cos: np.ndarray, sin: np.ndarray, inverse: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return frequencies from ever later rows: float32 tables hold small angles of early positions badly."""
    position = 1
    while 2 * position < len(cos):
        position *= 2
        angle = np.arctan2(sin[position], cos[position])
        turns = np.round((position * inverse - angle) / (2 * np.pi))
        inverse = (angle + 2 * np.pi * turns) / position
    return inverse


def _vector(value: ir.Value | None, table: ir.Value) -> NDArray[np.float64]:
    """Return the constant vector that positions are multiplied with."""
    value = through(value, *MOVES, "Transpose")
    node = made_by(value, "Concat")
    if node is not None and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]:
        value = through(node.inputs[0], *MOVES, "Transpose")
    node = expect(value, "positions times constant frequencies", "MatMul", "Mul", "Einsum")
    for operand in node.inputs:
        array = constant_array(through(operand, *MOVES, "Transpose"))
        if array is not None and array.size > 1:
            return array.ravel().astype(np.float64)
    return refuse("positions times constant frequencies", table)


def check_alike(first: Frequencies, other: Frequencies, layer: int) -> None:
    """Refuse layers that turn by different angles, for which GGUF has no place.

    Raises:
        ModelError: They differ.
    """
    same = first.inverse.shape == other.inverse.shape
    if not same or not np.allclose(first.inverse, other.inverse, rtol=FREQUENCY_TOLERANCE):
        msg = f"layer {layer} rotates by other frequencies than layer 0"
        raise ModelError(msg, where="rotary embedding", fix=FIX)
