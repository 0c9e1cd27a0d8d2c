"""Store equal initializers once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.passes.contract import PassResult

FIRST = 64  # different weights differ early; the rest of a mapped file need not be read then


@dataclass(frozen=True)
class DeduplicateInitializers:
    """Initializers of one graph with equal type, shape and bits become one: tied weights are tied again.

    Candidates are found by hash and then compared, so that a hash collision cannot merge two weights. Only
    tensors that share type, shape and first values with another one are read at all.
    """

    name: ClassVar[str] = "deduplicate_initializers"

    def run(self, model: ir.Model) -> PassResult:
        """Merge."""
        return PassResult(model, sum(_merge(group) for graph in model.graphs() for group in _alike(graph)))


def _alike(graph: ir.Graph) -> Iterator[list[ir.Value]]:
    """Yield groups of two or more initializers that share type, shape and first values."""
    groups: dict[tuple[ir.DataType, tuple[int, ...], bytes], list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not (value.is_graph_input() or value.is_graph_output()):
            first = _bits(tensor.numpy().reshape(-1)[:FIRST]).tobytes()
            groups[tensor.dtype, tuple(tensor.shape.numpy()), first].append(value)
    yield from (group for group in groups.values() if len(group) > 1)


def _merge(group: list[ir.Value]) -> int:
    first: dict[bytes, ir.Value] = {}
    merged = 0
    for value in group:
        kept = first.setdefault(_digest(value), value)
        if kept is not value and np.array_equal(_value_bits(kept), _value_bits(value)):
            value.replace_all_uses_with(kept)
            graph = value.graph
            assert graph is not None and value.name is not None
            del graph.initializers[value.name]
            merged += 1
    return merged


def _digest(value: ir.Value) -> bytes:
    return hashlib.blake2b(_value_bits(value).data, digest_size=16).digest()


def _value_bits(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return _bits(value.const_value.numpy())


def _bits(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array, without a copy where they lie side by side."""
    if array.dtype.kind == "O":
        return np.frombuffer(repr(array.tolist()).encode(), np.uint8)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
