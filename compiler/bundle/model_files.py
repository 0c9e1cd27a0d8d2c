"""Writing one model and its companions, each appearing whole, the model last."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.bundle.atomic import recover, remove, sibling, storage_errors, sync_file, sync_tree
from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.saving import save_model


def write_model_atomically(model: ir.Model, path: Path, companions: Mapping[Path, str]) -> None:
    """Write ``companions`` (text files) and then ``model`` with its external data, if it has any.

    All files are complete on the disk before the first one is moved into place: a full disk changes nothing.

    Args:
        model: Any model.
        path: The .onnx file; its folder is created if needed.
        companions: Path in the same folder -> text.

    Raises:
        UsageError: The disk is full or the place cannot be written.
    """
    path = Path(os.path.realpath(path))
    with files_appearing_whole(path) as folder:
        for companion, text in companions.items():
            if Path(os.path.realpath(companion.parent)) != path.parent:
                what = "a companion file must be in the model's folder"
                raise InternalError(what, where=str(companion))
            (folder / companion.name).write_text(text)
        save_model(model, folder / path.name)


@contextmanager
def files_appearing_whole(path: Path) -> Iterator[Path]:
    """Give a folder to write files into that are moved beside ``path`` when the block ends without an error.

    All are complete on the disk before the first is moved; the one named like ``path`` is moved last.

    Args:
        path: The main file; its folder is created if needed.

    Raises:
        UsageError: The disk is full or the place cannot be written.
    """
    path = Path(os.path.realpath(path))
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        folder = sibling(path, "tmp")
        try:
            folder.mkdir()
            yield folder
            sync_tree(folder)
            main = folder / path.name
            for new in [*(p for p in folder.iterdir() if p != main), main]:
                new.replace(path.with_name(new.name))
            sync_file(path.parent)
        finally:
            remove(folder)
