"""Floats as kernels read and write them: stored in half precision or in float32, computed in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.lower.templates import scaffold
from bitwright.compiler.lower.templates.scaffold import Buffer, Expr, vector_type

HALF = "float16"


def storage_of(weight: np.ndarray) -> str:
    """Return the narrowest type that holds a weight's values exactly: half the bytes to read, and the same result."""
    with np.errstate(over="ignore"):
        narrow = weight.astype(np.float16)
    return HALF if np.array_equal(narrow.astype(weight.dtype), weight) else "float32"


def widened(buffer: Buffer, size: Expr, lanes: int) -> Buffer:
    """Emit a copy in float32 and return it: numbers that are read one by one are converted in vectors, and once."""
    wide = scaffold.allocate((size,), "float32")
    with scaffold.loop(size // lanes) as block:
        store(wide, load(buffer, [block * lanes], lanes), [block * lanes], lanes)
    with scaffold.loop(size % lanes) as rest:
        at = size // lanes * lanes + rest
        store(wide, load(buffer, [at]), [at])
    return wide


def load(buffer: Buffer, indices: Sequence[Expr], lanes: int = 1) -> Expr:
    """Load ``lanes`` neighbouring elements along the last axis as float32."""
    value = scaffold.load(buffer, indices, lanes)
    return T.cast(value, vector_type("float32", lanes)) if str(buffer.dtype) == HALF else value


def store(buffer: Buffer, value: Expr, indices: Sequence[Expr], lanes: int = 1) -> None:
    """Store ``lanes`` neighbouring float32 elements along the last axis, rounded to what the buffer holds."""
    if str(buffer.dtype) == HALF:
        value = T.cast(value, vector_type(HALF, lanes))
    scaffold.store(buffer, value, indices, lanes)
