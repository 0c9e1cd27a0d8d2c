"""Accumulators in general registers or in one vector register."""

from __future__ import annotations

from typing import Protocol

from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Expr, allocate, load, store


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
