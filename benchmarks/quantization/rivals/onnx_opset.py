"""Raising a model's opset with the ONNX version converter, for tools that need a newer one than the model has."""

from __future__ import annotations

from pathlib import Path

import onnx


def at_opset(source: Path, work: Path, opset: int) -> Path:
    """Return the model converted to an opset, or as it is if that is new enough."""
    model = onnx.load(source)
    current = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if current >= opset:
        return source
    converted = work / "opset.onnx"
    onnx.save(onnx.version_converter.convert_version(model, opset), converted)
    return converted
