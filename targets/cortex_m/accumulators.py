"""Accumulators in general registers, in one vector register, or in a vector register each."""

from __future__ import annotations

from typing import Protocol

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Expr, allocate, load, shuffle, splat, store


class Accumulators(Protocol):
    """int32 variables with numbers."""

    def store(self, index: int, value: Expr) -> None:
        """Write one variable, or neighbours if ``value`` is a vector."""
        ...

    def load(self, index: int, lanes: int = 1) -> Expr:
        """Return one variable, or several neighbours as a vector."""
        ...


class Scalars:
    """Variables that are a vector only when they are read as one.

    Each is an allocation of its own: LLVM keeps an array that is also read as a vector in a vector register, and then
    moves every element there and back around each multiplication.
    """

    def __init__(self, count: int) -> None:
        self._buffers = [allocate((1,), "int32", "local") for _ in range(count)]

    def store(self, index: int, value: Expr) -> None:
        """Write one variable."""
        store(self._buffers[index], value, [0])

    def clear(self, index: int) -> None:
        """Set one variable to zero."""
        self.store(index, T.int32(0))

    def partial(self, index: int) -> Expr:
        """Return one variable."""
        return self.load(index)

    def load(self, index: int, lanes: int = 1) -> Expr:
        """Return one variable, or several neighbours as a vector."""
        values = [load(buffer, [0]) for buffer in self._buffers[index : index + lanes]]
        return values[0] if lanes == 1 else T.Shuffle(values, list(range(lanes)))


class Vector:
    """Variables that are always one vector."""

    def __init__(self, lanes: int) -> None:
        self._buffer, self._lanes = allocate((lanes,), "int32", "local"), lanes

    def store(self, index: int, value: Expr) -> None:
        """Write all variables."""
        store(self._buffer, value, [index], self._lanes)

    def load(self, index: int, lanes: int = 1) -> Expr:
        """Return some variables."""
        return load(self._buffer, [index], lanes)


class PartialSums:
    """Variables of four partial sums each, in vectors that are added up at the end."""

    LANES = 4

    def __init__(self, count: int) -> None:
        self._buffers = [allocate((self.LANES,), "int32", "local") for _ in range(count)]

    def clear(self, index: int) -> None:
        """Set one variable to zero."""
        self.store(index, splat(T.int32(0), self.LANES))

    def store(self, index: int, value: Expr) -> None:
        """Write the partial sums of one variable."""
        store(self._buffers[index], value, [0], self.LANES)

    def partial(self, index: int) -> Expr:
        """Return the partial sums of one variable."""
        return load(self._buffers[index], [0], self.LANES)

    def load(self, index: int, lanes: int = 1) -> Expr:
        """Return one variable, or four neighbours as a vector."""
        halves = [self._half(k) for k in range(index, index + lanes)]
        if lanes == 1:
            return T.Shuffle([_pairs(halves[0], halves[0])], [0])
        return shuffle([_pairs(*halves[:2]), _pairs(*halves[2:])], range(self.LANES))

    def _half(self, index: int) -> Expr:
        """Return int32x2: the lower and upper partial sums of one variable added."""
        sums = self.partial(index)
        return shuffle(sums, (0, 1)) + shuffle(sums, (2, 3))


def _pairs(left: Expr, right: Expr) -> Expr:
    return T.call_llvm_pure_intrin("llvm.arm.neon.vpadd.v2i32", left, right, dtype="int32x2")
