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


@dataclass(frozen=True)
class DeduplicateInitializers:
    """Initializers of one graph with equal type, shape and bits become one: tied weights are tied again.

    Candidates are found by hash and then compared, so that a hash collision cannot merge two weights. Only
    tensors that share type and shape with another one are read at all.
    """

    name: ClassVar[str] = "deduplicate_initializers"

    def run(self, model: ir.Model) -> PassResult:
        """Merge."""
        return PassResult(model, sum(_merge(group) for graph in model.graphs() for group in _alike(graph)))


def _alike(graph: ir.Graph) -> Iterator[list[ir.Value]]:
    """Yield groups of two or more initializers that share type and shape."""
    groups: dict[tuple[ir.DataType, tuple[int, ...]], list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not (value.is_graph_input() or value.is_graph_output()):
            groups[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
    yield from (group for group in groups.values() if len(group) > 1)


def _merge(group: list[ir.Value]) -> int:
    first: dict[bytes, ir.Value] = {}
    merged = 0
    for value in group:
        kept = first.setdefault(_digest(value), value)
        if kept is not value and np.array_equal(_bits(kept), _bits(value)):
            value.replace_all_uses_with(kept)
            graph = value.graph
            assert graph is not None and value.name is not None
            del graph.initializers[value.name]
            merged += 1
    return merged


def _digest(value: ir.Value) -> bytes:
    return hashlib.blake2b(_bits(value).data, digest_size=16).digest()


def _bits(value: ir.Value) -> np.ndarray:
    """Return the tensor's bytes, without a copy where it is an ordinary array."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    if array.dtype.kind == "O":
        return np.frombuffer(repr(array.tolist()).encode(), np.uint8)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
