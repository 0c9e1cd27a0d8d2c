"""Writing models: one file below a gigabyte, external data beside it above."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.graph.mapped import release_pages
from bitwright.compiler.graph.wire import write_model

# protobuf ends at 2 GiB; leave room for the graph itself and for readers that copy.
INLINE_LIMIT_BYTES = 1 << 30
# Above this a runtime is given a file whose weights it maps: as bytes they exist three times more (message,
# serialized message, session), 270 MB for a model of 90 MB.
MAP_ABOVE_BYTES = 16 << 20


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers of the main graph, each counted once."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def save_model(model: ir.Model, path: Path, *, external: bool | None = None) -> list[Path]:
    """Write ``model`` and return the files written.

    Existing files are replaced, never written into, so that a model whose weights are views of ``path`` stays
    what it is. The result reads no file but its own.

    Args:
        model: Any model.
        path: The .onnx file; external data goes to ``path.name + ".data"`` beside it.
        external: Force or forbid external data; None decides by size.
    """
    if external is None:
        external = weight_bytes(model) > INLINE_LIMIT_BYTES
    data = path.with_name(path.name + ".data")
    release_pages(model)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        if external:
            ir.save(model, new, external_data=data.name)
        else:
            with new.open("wb") as stream:
                write_model(model, stream)
        written = [p for p in (new.with_name(data.name), new) if p.exists()]
        return [p.replace(path.with_name(p.name)) for p in written][::-1]


@contextmanager
def loadable(model: ir.Model) -> Iterator[bytes | Path]:
    """Give a runtime what it opens ``model`` from, at the least memory.

    Yields:
        The serialized model; of a large model a file whose weights the runtime maps. The file is gone
        afterwards, which a mapping survives.
    """
    if weight_bytes(model) <= MAP_ABOVE_BYTES:
        message = BytesIO()
        write_model(model, message)
        yield message.getvalue()
        return
    release_pages(model)
    # Where a mapped file cannot be deleted (Windows) it is left to the system's cleaning.
    with tempfile.TemporaryDirectory(prefix="bitwright-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data=path.name + ".data")
        yield path
