"""A GGUF file's weights put into the ONNX decoder they belong to, and what a file holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bitwright.compiler.bundle.model_files import write_model_atomically
from bitwright.compiler.errors import ModelError
from bitwright.compiler.gguf.reader import GgufFile, StoredTensor
from bitwright.compiler.llama.tensors import ModelTensor, put_back
from bitwright.compiler.to_gguf.export import Opened, open_decoder

# Values that people read; a vocabulary is not.
SHOWN_TEXT = 80


def with_weights_of(opened: Opened, path: Path) -> ir.Model:
    """Return the model with the matrices of a GGUF file, dequantized to float32.

    The file's vectors (gains, biases) must be the model's own: they tell whether the file belongs to it.

    Args:
        opened: The decoder; its model is edited and returned.
        path: A GGUF file of the same decoder.

    Raises:
        ModelError: The file is refused, or belongs to another model; the message names the tensor.
    """
    with GgufFile(path) as file:
        spare = set(file.tensors) - {t.name for t in opened.tensors}
        if spare:
            raise _foreign(path, sorted(spare)[0], "the model has no such tensor")
        for tensor in opened.tensors:
            _put(file, tensor, path)
    return opened.model


def _put(file: GgufFile, tensor: ModelTensor, path: Path) -> None:
    found = file.tensors.get(tensor.name)
    if found is None or found.shape != tensor.shape:
        shape = "missing" if found is None else f"of shape {found.shape}"
        raise _foreign(path, tensor.name, f"it is {shape}, the model's is of shape {tensor.shape}")
    values = file.array(tensor.name)
    if tensor.is_matrix:
        put_back(tensor, values)
    elif not (abs(values - tensor.load()) <= 1e-5 * abs(tensor.load()).max()).all():
        raise _foreign(path, tensor.name, "its values are not the model's")


def _foreign(path: Path, name: str, what: str) -> ModelError:
    return ModelError(what, where=f"{path}: tensor '{name}'", fix="give a file that was made from this model")


def restore(model: Path, weights: Path, output: Path, *, threads: int = 1) -> float:
    """Write an ONNX model with the weights of a GGUF file.

    Returns:
        The proof that the model was recognised rightly; see :func:`~.proof.prove`.

    Raises:
        ModelError: The model or the file is refused, or they do not belong together.
        UsageError: The output cannot be written.
    """
    opened = open_decoder(model, threads=threads)
    write_model_atomically(with_weights_of(opened, weights), output, {})
    return opened.proof


@dataclass(frozen=True)
class Listing:
    """What a file holds.

    Attributes:
        path: The file.
        version: Of the format.
        metadata: Values by key; long texts and lists are described.
        tensors: In the file's order.
        bits: Bits of the tensors' data for each element.
    """

    path: Path
    version: int
    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]
    bits: float

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "path": str(self.path),
            "version": self.version,
            "metadata": self.metadata,
            "bits_per_weight": self.bits,
            "tensors": [
                {"name": t.name, "type": t.kind.name, "shape": list(t.shape), "bytes": t.bytes}
                for t in self.tensors
            ],
        }


def listing(path: Path) -> Listing:
    """Read a file's header.

    Raises:
        ModelError: It is no GGUF file, is cut off or contradicts itself.
    """
    with GgufFile(path) as file:
        metadata = {key: _shown(typed.value) for key, typed in file.metadata.items()}
        tensors = tuple(file.tensors.values())
        elements = sum(t.elements for t in tensors)
        bits = 8 * sum(t.bytes for t in tensors) / elements if elements else 0.0
        return Listing(path, file.version, metadata, tensors, bits)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} values"
    found = str(value)
    return found if len(found) <= SHOWN_TEXT else f"{found[:SHOWN_TEXT]}... ({len(found)} characters)"
