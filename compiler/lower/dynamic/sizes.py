"""Sizes that follow the length of a sequence: polynomials, read off the same model at several lengths.

Shapes and strides of a network are sums and products of its dimensions, and a length enters each at most squared
(attention's scores). So the model is lowered for a few lengths, and whatever differs is a polynomial through what was
found: three lengths determine it, every further one checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, TypeAlias

from tvm import tirx

DEGREE = 2


@dataclass(frozen=True)
class Polynomial:
    """A size that is no constant, as a function of the length.

    Attributes:
        coefficients: Of the powers 0, 1, 2; not all but the first are 0.
    """

    coefficients: tuple[int, int, int]

    def at(self, length: Any) -> Any:
        """Return the size for a length, a number or an expression."""
        found: Any = 0
        for coefficient in reversed(self.coefficients):
            found = found * length + coefficient
        return found

    def __mul__(self, other: Size) -> Size:
        if not isinstance(other, int | Polynomial):
            return NotImplemented
        product = [0] * (2 * DEGREE + 1)
        for i, a in enumerate(self.coefficients):
            for j, b in enumerate(_coefficients(other)):
                product[i + j] += a * b
        assert not any(product[DEGREE + 1 :]), "a size grows with the square of the length at most"
        return _size(product)

    __rmul__ = __mul__

    def __add__(self, other: Size) -> Size:
        if not isinstance(other, int | Polynomial):
            return NotImplemented
        return _size([a + b for a, b in zip(self.coefficients, _coefficients(other), strict=True)])

    __radd__ = __add__


Size: TypeAlias = int | Polynomial


def _coefficients(size: Size) -> tuple[int, int, int]:
    return size.coefficients if isinstance(size, Polynomial) else (size, 0, 0)


def _size(coefficients: Sequence[int]) -> Size:
    constant, linear, square = coefficients[: DEGREE + 1]
    return Polynomial((constant, linear, square)) if linear or square else constant


def at(size: Size, length: Any) -> Any:
    """Return a size for a length, a number or an expression."""
    return size.at(length) if isinstance(size, Polynomial) else size


def expression(size: Size, length: Any) -> Any:
    """Return a size as an int64 expression of the variable ``length``."""
    return size.at(length) if isinstance(size, Polynomial) else tirx.const(size, "int64")


def fitted(lengths: Sequence[int], sizes: Sequence[int]) -> Size | None:
    """Return the size that has these values at these lengths; None if no polynomial of degree 2 has.

    Args:
        lengths: At least three, different.
        sizes: What was found at each.
    """
    if len(set(sizes)) == 1:
        return sizes[0]
    coefficients = [Fraction(0)] * (DEGREE + 1)
    for i in range(DEGREE + 1):  # Lagrange
        term = [Fraction(sizes[i])]
        for j in range(DEGREE + 1):
            if j != i:
                scale = Fraction(1, lengths[i] - lengths[j])
                below = [-lengths[j] * c * scale for c in term] + [Fraction(0)]
                above = [Fraction(0)] + [c * scale for c in term]
                term = [a + b for a, b in zip(below, above, strict=True)]
        coefficients = [a + b for a, b in zip(coefficients, term, strict=True)]
    if any(c.denominator != 1 for c in coefficients):
        return None
    size = _size([int(c) for c in coefficients])
    return size if all(at(size, n) == found for n, found in zip(lengths, sizes, strict=True)) else None


class Unlike(Exception):  # noqa: N818
    """What was found at several lengths is no function of the length; the message says what it is."""


def unified(lengths: Sequence[int], found: Sequence[Any]) -> Any:
    """Return what was found at every length as one: records and tuples whose numbers are sizes.

    Raises:
        Unlike: They differ in more than sizes.
    """
    first = found[0]
    if all(type(other) is type(first) and other == first for other in found[1:]):
        return first
    if all(type(value) is int for value in found):
        size = fitted(lengths, found)
        if size is None:
            pairs = ", ".join(f"{value} at {n}" for n, value in zip(lengths, found, strict=True))
            msg = f"a size that is no polynomial of the length: {pairs}"
            raise Unlike(msg)
        return size
    if all(isinstance(value, tuple) and len(value) == len(first) for value in found):
        return tuple(unified(lengths, parts) for parts in zip(*found, strict=True))
    if is_dataclass(first) and not isinstance(first, type) and len({type(value) for value in found}) == 1:
        parts = {f.name: unified(lengths, [getattr(v, f.name) for v in found]) for f in fields(first)}
        return replace(first, **parts)
    shown = ", ".join(f"{value!r} at {n}" for n, value in zip(lengths, found, strict=True))
    msg = f"values that differ from length to length: {shown[:200]}"
    raise Unlike(msg)


def substituted(record: Any, length: Any) -> Any:
    """Return a record or tuple with expressions of ``length`` in the place of sizes that follow it."""
    if isinstance(record, Polynomial):
        return record.at(length)
    if isinstance(record, tuple):
        return tuple(substituted(part, length) for part in record)
    if is_dataclass(record) and not isinstance(record, type):
        parts = {f.name: substituted(getattr(record, f.name), length) for f in fields(record)}
        return replace(record, **parts)
    return record
