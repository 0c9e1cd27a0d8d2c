"""Writing models: one file below a gigabyte, external data beside it above."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from bitwright.compiler.graph.mapped import MappedTensor

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
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        if external:
            ir.save(model, new, external_data=data.name)
        else:
            with _loaded(model):
                ir.save(model, new)
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
        with _loaded(model):
            message: bytes = ir.to_proto(model).SerializeToString()
        yield message
        return
    for file in {t.file for t in _tensors(model) if isinstance(t, MappedTensor)}:
        file.release_pages()
    # Where a mapped file cannot be deleted (Windows) it is left to the system's cleaning.
    with tempfile.TemporaryDirectory(prefix="bitwright-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data=path.name + ".data")
        yield path


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol | None]:
    return (v.const_value for graph in model.graphs() for v in graph.initializers.values())


@contextmanager
def _loaded(model: ir.Model) -> Iterator[None]:
    """Hold external initializers in memory for a while: serialized as they are they would name their old file."""
    values = [v for graph in model.graphs() for v in graph.initializers.values()]
    tensors = {v: v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)}
    try:
        for value, tensor in tensors.items():
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        yield
    finally:
        for value, tensor in tensors.items():
            value.const_value = tensor
