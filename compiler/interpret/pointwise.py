"""Quantize, Dequantize, QAdd, QMul and QLut: one output element from one element of each input."""

from __future__ import annotations

import numpy as np

from bitwright.compiler.interpret.fma import fma
from bitwright.compiler.program.ops import QAdd, QLut, QMul, QuantParams, Tensor

Pair = tuple[np.ndarray, np.ndarray]


def add(step: QAdd, operands: Pair, quants: tuple[QuantParams, QuantParams], output: Tensor) -> np.ndarray:
    """Run a QAdd on integer operands with parameters ``quants``; numpy broadcasting."""
    (a, b), y, (qa, qb) = operands, _quant(output), quants
    sy = np.float32(y.scale)
    ra, rb = np.float32(qa.scale) / sy, np.float32(qb.scale) / sy
    offset = ra * np.float32(qa.zero_point) + rb * np.float32(qb.zero_point)
    c = np.float32(y.zero_point) - offset
    inner = fma(b.astype(np.float32), np.asarray(rb), np.asarray(c))
    total = fma(a.astype(np.float32), np.asarray(ra), inner)
    return np.asarray(np.clip(np.rint(total), step.lower, step.upper), output.dtype)


def mul(step: QMul, operands: Pair, quants: tuple[QuantParams, QuantParams], output: Tensor) -> np.ndarray:
    """Run a QMul on integer operands with parameters ``quants``; numpy broadcasting."""
    (a, b), y, (qa, qb) = operands, _quant(output), quants
    factor = np.float32(qa.scale) * np.float32(qb.scale) / np.float32(y.scale)
    product = (a.astype(np.int32) - qa.zero_point) * (b.astype(np.int32) - qb.zero_point)
    steps = np.rint(product.astype(np.float32) * factor).astype(np.float64) + y.zero_point
    return np.asarray(np.clip(steps, step.lower, step.upper), output.dtype)


def lookup(step: QLut, x: np.ndarray) -> np.ndarray:
    """Run a QLut on integers ``x``."""
    return step.table[x.astype(np.int64) - np.iinfo(x.dtype).min]


def _quant(tensor: Tensor) -> QuantParams:
    assert tensor.quant is not None
    return tensor.quant
