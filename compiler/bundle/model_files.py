"""Writing one model and its companions, each appearing whole, the model last."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.bundle.atomic import recover, remove, sibling, storage_errors, sync_file, write_atomically
from bitwright.compiler.graph.saving import save_model


def write_model_atomically(model: ir.Model, path: Path, companions: Mapping[Path, str]) -> None:
    """Write ``companions`` (text files) and then ``model`` with its external data, if it has any.

    Args:
        model: Any model.
        path: The .onnx file.
        companions: Path -> text.

    Raises:
        UsageError: The disk is full or the place cannot be written.
    """
    path = Path(os.path.realpath(path))
    for companion, text in companions.items():
        write_atomically(companion, text.encode())
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        folder = sibling(path, "tmp")
        try:
            folder.mkdir()
            for written in reversed(save_model(model, folder / path.name)):
                sync_file(written)
                os.replace(written, path.with_name(written.name))
            sync_file(path.parent)
        finally:
            remove(folder)
