"""What the constants of a model take, before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from bitwright.compiler.graph.model import consumers, node_label, static_shape


def constant_bytes(model: ir.Model | None) -> int:
    """Return the bytes of a model's initializers."""
    assert model is not None
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)


def size_ledger(before: ir.Model | None, after: ir.Model | None) -> list[dict[str, Any]]:
    """Return a row per initializer of the quantized model: who reads it, its bytes, those of what it was made from.

    A constant is made from the one whose name its own begins with; what else was made from that (scales, zero points)
    and what is new counts as nothing before.
    """
    assert before is not None and after is not None
    after_bytes = _bytes(after)
    origin = _origins(before, after_bytes)
    rows = []
    for name, value in after.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None:
            shape = static_shape(value) or tuple(tensor.shape.numpy())
            rows.append(
                {
                    "initializer": name,
                    "node": _reader(value),
                    "dtype": tensor.dtype.name.lower(),
                    "shape": list(shape),
                    "bytes": after_bytes[name],
                    "float_bytes": origin.get(name, 0),
                }
            )
    return sorted(rows, key=lambda row: (-row["bytes"], row["initializer"]))


def _bytes(model: ir.Model) -> dict[str, int]:
    tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return {name: int(tensor.nbytes) for name, tensor in tensors if tensor is not None}


def _origins(before: ir.Model, after: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes before of every initializer that stands for one of the float model's."""
    sources = _bytes(before)
    found = {name: sources[name] for name in after if name in sources}
    gone = {name for name in sources if name not in after}
    heirs: dict[str, str] = {}
    for name in after:
        source = next((s for s in _beginnings(name) if s in gone), None)
        if name not in sources and source is not None:
            known = heirs.get(source)
            heirs[source] = name if known is None or after[name] > after[known] else known
    return found | {heir: sources[source] for source, heir in heirs.items()}


def _beginnings(name: str) -> Iterator[str]:
    """Yield what stands before each underscore, the longest first."""
    while "_" in name:
        name = name.rpartition("_")[0]
        yield name


# A weight reaches its operator through these.
BETWEEN_WEIGHT_AND_READER = ("QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity")


def _reader(value: ir.Value) -> str:
    """Return the first operator behind the quantizers that reads an initializer, "" if nothing does."""
    current = value
    while readers := consumers(current):
        node = min(readers, key=node_label)
        if node.op_type not in BETWEEN_WEIGHT_AND_READER or not node.outputs:
            return node_label(node)
        current = node.outputs[0]
    return ""
