"""From quantized parts to one model: weights go to the data file as soon as they are final."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from bitwright.compiler.errors import InternalError
from bitwright.compiler.streaming.chain import Part
from bitwright.passes.raise_opset import RaiseOpset

# Smaller constants stay in the model: shapes, axes and single scales are read by whoever loads it.
INLINE_BYTES = 1024
# Large tensors begin at pages, which can be mapped; small ones at what any element type wants.
PAGE, SMALL = 4096, 64
PAGED_BYTES = 1 << 20
Identity = tuple[object, ...]


class PartWriter:
    """Takes quantized parts one after the other, writes their weights, and joins what is left of them.

    Args:
        data: The data file; its name is what the model will state.
        end: Bytes of it that are finished parts' of an earlier run; what is behind them is cut off.
    """

    def __init__(self, data: Path, end: int = 0) -> None:
        self.data = data
        self._parts: list[ir.Model] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        self._stream: BinaryIO = data.open("r+b" if end else "wb")
        self._stream.truncate(end)
        self._stream.seek(end)

    @property
    def end(self) -> int:
        """Bytes that were written."""
        return self._stream.tell()

    def add(self, model: ir.Model) -> dict[str, str]:
        """Write a part's weights; its constants are references into the file afterwards.

        Returns:
            SHA-256 of each of them, by name.
        """
        digests: dict[str, str] = {}
        for value in model.graph.initializers.values():
            tensor, name = value.const_value, value.name or ""
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes <= INLINE_BYTES:
                continue
            value.const_value, digests[name] = self._written(tensor, name)
        self._parts.append(model)
        return digests

    def take(self, model: ir.Model, digests: Mapping[str, str]) -> None:
        """Take a part of an earlier run, whose weights are in the file.

        Args:
            model: The part.
            digests: What :meth:`add` returned.

        Raises:
            ValueError: The file does not hold them.
        """
        for name, digest in digests.items():
            value = model.graph.initializers.get(name)
            tensor = None if value is None else value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or tensor.location != self.data.name:
                msg = f"'{name}' is not in the file"
                raise ValueError(msg)
            place = tensor.offset or 0, tensor.length or 0
            content = self._read(*place)
            if hashlib.sha256(content).hexdigest() != digest:
                msg = f"'{name}' is not what was written"
                raise ValueError(msg)
            self._places[bytes.fromhex(digest)] = place
        self._parts.append(model)

    def _read(self, offset: int, length: int) -> bytes:
        with self.data.open("rb") as stream:
            stream.seek(offset)
            return stream.read(length)

    def _written(self, tensor: ir.TensorProtocol, name: str) -> tuple[ir.ExternalTensor, str]:
        """Write a tensor unless the same bytes are there already (a table that two parts read)."""
        content = tensor.tobytes()
        digest = hashlib.sha256(content).digest()
        if digest not in self._places:
            step = PAGE if len(content) >= PAGED_BYTES else SMALL
            place = -(-self._stream.tell() // step) * step
            self._stream.write(bytes(place - self._stream.tell()))
            self._stream.write(content)
            self._places[digest] = (place, len(content))
        place, length = self._places[digest]
        reference = ir.ExternalTensor(
            self.data.name,
            place,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=self.data.parent,
        )
        return reference, digest.hex()

    def flush(self) -> None:
        """Make what was written so far readable through the references, and safe on the disk."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def joined(self, source: ir.Model, parts: Sequence[Part]) -> ir.Model:
        """Return all parts as one model with the inputs and outputs of the source.

        Args:
            source: The model that was cut.
            parts: Its parts, in the order in which their models were added.
        """
        opset = max(m.graph.opset_imports.get("", 0) for m in self._parts)
        for model in self._parts:
            RaiseOpset(opset).run(model)
        graph = _Graph(source, parts)
        for model in self._parts:
            graph.add(model)
        return graph.model(self._parts)


class _Graph:
    """The joined graph so far."""

    def __init__(self, source: ir.Model, parts: Sequence[Part]) -> None:
        self._source = source
        self._inputs = [ir.Value(name=v.name, type=v.type, shape=v.shape) for v in source.graph.inputs]
        self._values = {v.name: v for v in self._inputs}
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[Identity, ir.Value] = {}
        # Names that parts know each other's values by.
        self._public = {v.name or "" for p in parts for v in p.outputs} | {v.name or "" for v in self._inputs}
        self._taken: set[str] = set(self._public)
        self._node_names: set[str] = set()

    def add(self, model: ir.Model) -> None:
        """Take a part's nodes and constants out of its model."""
        graph = model.graph
        outputs = {v.name: v for v in graph.outputs}
        graph.outputs.clear()
        for value in list(graph.inputs):
            if value.name not in self._values:
                what = f"a part reads '{value.name}', which none before it makes"
                raise InternalError(what)
            ir.convenience.replace_all_uses_with(value, self._values[value.name])
        for value in list(graph.initializers.values()):
            del graph.initializers[value.name or ""]
            self._take_constant(value)
        for node in list(graph):
            graph.remove(node)
            node.name = _free(node.name or node.op_type, self._node_names)
            for value in node.outputs:
                if value.name and value.name not in outputs:
                    value.name = _free(value.name, self._taken)
            self._nodes.append(node)
        self._values |= outputs

    def _take_constant(self, value: ir.Value) -> None:
        name = value.name or ""
        key = _identity(value)
        if key in self._constants:
            ir.convenience.replace_all_uses_with(value, self._constants[key])
            return
        value.name = _free(name, self._taken)
        self._constants[key] = self._initializers[value.name] = value

    def model(self, parts: Sequence[ir.Model]) -> ir.Model:
        """Return the whole."""
        source = self._source
        outputs = []
        for wanted in source.graph.outputs:
            found = self._values[wanted.name]
            found.type, found.shape = wanted.type, wanted.shape
            outputs.append(found)
        graph = ir.Graph(
            self._inputs,
            outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            name=source.graph.name,
            doc_string=source.graph.doc_string,
            opset_imports=dict(_domains(parts)),
        )
        return ir.Model(
            graph,
            ir_version=max(m.ir_version for m in parts),
            producer_name=source.producer_name,
            producer_version=source.producer_version,
            metadata_props=dict(source.metadata_props),
        )


def _domains(parts: Sequence[ir.Model]) -> Iterator[tuple[str, int]]:
    for domain in dict.fromkeys(d for m in parts for d in m.graph.opset_imports):
        yield domain, max(m.graph.opset_imports.get(domain, 0) for m in parts)


def _free(name: str, taken: set[str]) -> str:
    found = next(n for k in count(1) if (n := name if k == 1 else f"{name}_{k}") not in taken)
    taken.add(found)
    return found


def _identity(value: ir.Value) -> Identity:
    """Return what is the same for two constants that are equal to the last bit."""
    tensor = value.const_value
    assert tensor is not None, "an initializer has a value"
    place = (tensor.offset, tensor.length) if isinstance(tensor, ir.ExternalTensor) else None
    return tensor.dtype, tuple(tensor.shape.numpy()), place, tensor.tobytes() if place is None else b""
