"""Writing models: one file below a gigabyte, external data beside it above."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

# protobuf ends at 2 GiB; leave room for the graph itself and for readers that copy.
INLINE_LIMIT_BYTES = 1 << 30


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers of the main graph, each counted once."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def save_model(model: ir.Model, path: Path, *, external: bool | None = None) -> list[Path]:
    """Write ``model`` and return the files written.

    Args:
        model: Any model.
        path: The .onnx file; external data goes to ``path.name + ".data"`` beside it.
        external: Force or forbid external data; None decides by size.
    """
    if external if external is not None else weight_bytes(model) > INLINE_LIMIT_BYTES:
        data = path.with_name(path.name + ".data")
        ir.save(model, path, external_data=data.name)
        return [path, data] if data.exists() else [path]
    ir.save(model, path)
    return [path]
