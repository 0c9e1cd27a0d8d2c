"""Vectors of float32: how wide the target's are, and what is not one instruction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm.ir.prim import Shuffle
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates.scaffold import Expr, splat, vector_type


@dataclass(frozen=True)
class VectorUnit:
    """The vector registers of a target.

    Attributes:
        lanes: float32 numbers in one, a power of two.
        registers: How many there are.
        widens: It converts vectors of float16 to float32 and back.
        half_lanes: float16 numbers in a vector that it multiplies and adds; 0 if it does not.
    """

    lanes: int
    registers: int
    widens: bool = False
    half_lanes: int = 0


def vector_unit(target: tvm.target.Target) -> VectorUnit:
    """Return the vector registers of a target, by the features of its processor.

    TVM's own ``llvm_get_vector_width`` says 512 bits of every x86 processor.
    """
    features = {str(feature) for feature in tvm.target.codegen.llvm_get_cpu_features(target)}
    if "avx512f" in features:
        return VectorUnit(16, 32, widens=True, half_lanes=32 if "avx512fp16" in features else 0)
    if "avx" in features:
        return VectorUnit(8, 16, widens="f16c" in features)
    is_aarch64 = str(target.attrs.get("mtriple", "")).startswith("aarch64")
    half = 8 if is_aarch64 and "fullfp16" in features else 0
    return VectorUnit(4, 32 if is_aarch64 else 16, widens=is_aarch64, half_lanes=half)


def number(value: float, lanes: int) -> Expr:
    """Return a float32 constant in every lane."""
    return splat(T.float32(float(value)), lanes)


def keep(value: Expr) -> Expr:
    """Bind a value to a variable: an expression is a tree, and every use of a node would compute it again.

    TVM's simplifier puts the value of a variable back in its place where it is a pure function; a call it knows
    nothing about, which costs no instruction, keeps it from that.
    """
    if isinstance(value, tvm.ir.expr.TensorLoad) or not str(value.ty.dtype).startswith("float"):
        return T.Bind(value)
    return T.Bind(T.call_llvm_intrin("llvm.arithmetic.fence", value, dtype=value.ty.dtype))


def multiply_add(a: Expr, b: Expr, c: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """Return ``a * b + c``, rounded once where the target has an instruction for it."""
    return T.call_llvm_pure_intrin("llvm.fmuladd", a, b, c, dtype=vector_type(dtype, lanes))


def polynomial(x: Expr, coefficients: Sequence[float], lanes: int) -> Expr:
    """Evaluate a polynomial by Horner's rule; the coefficient of the highest power comes first."""
    total = number(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        total = multiply_add(total, x, number(coefficient, lanes), lanes)
    return total


def across(value: Expr, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Combine the lanes of a vector into one number, by halves."""
    while lanes > 1:
        value, lanes = keep(value), lanes // 2
        value = combine(pick(value, range(lanes)), pick(value, range(lanes, 2 * lanes)))
    return value


def pick(value: Expr, lanes: Sequence[int]) -> Expr:
    """Return some lanes of a vector."""
    return Shuffle([value], [T.int32(lane) for lane in lanes])


def transpose(rows: Sequence[Expr], lanes: int) -> list[Expr]:
    """Transpose a square of ``lanes`` vectors by exchanging blocks of half the size, again and again."""
    found: list[Any] = list(rows)
    half = lanes // 2
    while half:
        for first in (k for k in range(lanes) if not k & half):
            second = first + half
            pair = (found[first], found[second])
            low = [lane if not lane & half else lanes + lane - half for lane in range(lanes)]
            high = [lane + half if not lane & half else lanes + lane for lane in range(lanes)]
            found[first], found[second] = (keep(_both(pair, order)) for order in (low, high))
        half //= 2
    return found


def _both(pair: tuple[Expr, Expr], lanes: Sequence[int]) -> Expr:
    return Shuffle(list(pair), [T.int32(lane) for lane in lanes])
