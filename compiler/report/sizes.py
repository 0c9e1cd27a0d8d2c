"""What the constants of a model take, before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import consumers, node_label, static_shape


def constant_bytes(model: ir.Model | None) -> int:
    """Return the bytes of a model's initializers."""
    assert model is not None
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(int(tensor.nbytes) for tensor in tensors if tensor is not None)


def size_ledger(before: ir.Model | None, after: ir.Model | None) -> list[dict[str, Any]]:
    """Return a row per initializer of the quantized model: who reads it, its bytes, those of its values in float32."""
    assert before is not None and after is not None
    rows = []
    for name, value in after.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            continue
        quantized = name.endswith("_quantized")
        shape = static_shape(value) or tuple(tensor.shape.numpy())
        elements = int(np.prod(shape, dtype=np.int64))
        stem = name.removesuffix("_quantized").removesuffix("_corrected")
        added = stem != name.removesuffix("_quantized") and stem not in before.graph.initializers
        overhead = added or (not quantized and name not in before.graph.initializers)
        rows.append(
            {
                "initializer": name,
                "node": _reader(value),
                "dtype": tensor.dtype.name.lower(),
                "shape": list(shape),
                "bytes": int(tensor.nbytes),
                "float_bytes": 0 if overhead else elements * 4 if quantized else int(tensor.nbytes),
            }
        )
    return sorted(rows, key=lambda row: (-row["bytes"], row["initializer"]))


# A weight reaches its operator through these.
BETWEEN_WEIGHT_AND_READER = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "Identity")


def _reader(value: ir.Value) -> str:
    """Return the first operator behind the quantizers that reads an initializer, "" if nothing does."""
    current = value
    while readers := consumers(current):
        node = min(readers, key=node_label)
        if node.op_type not in BETWEEN_WEIGHT_AND_READER or not node.outputs:
            return node_label(node)
        current = node.outputs[0]
    return ""
