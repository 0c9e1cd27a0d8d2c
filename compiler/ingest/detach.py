"""Parsing a model file without copying its weights: they are cut out of the message before it is parsed.

A protobuf message is a sequence of fields, ``key payload``, with ``key = number << 3 | wire type`` as a varint.
Only two levels are taken apart here, the model's graph and the graph's initializers; every other field is copied
as it stands, so that what the parser sees differs from the file in nothing but the cut-out bytes.
https://protobuf.dev/programming-guides/encoding describes the format, onnx.proto the numbers.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import onnx
from onnx import TensorProto

from bitwright.compiler.graph.wire import GRAPH, INITIALIZER, LENGTH_DELIMITED, RAW_DATA, field_head

# Below this a copy is cheaper than a page.
CUT_ABOVE_BYTES = 64 << 10

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, LENGTH_DELIMITED, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_VARINT_BYTES, _VARINT_LIMIT = 10, 1 << 64
_CONTINUED = 0x80
_LARGEST_NUMBER = (1 << 29) - 1
# A hostile file of tiny fields is walked for about a second and then left to the parser, which is compiled.
_MOST_FIELDS = 1_000_000
_LARGEST_TENSOR = 1_000

_TENSOR = {name: field.number for name, field in onnx.TensorProto.DESCRIPTOR.fields_by_name.items()}
_DATA_TYPE = _TENSOR["data_type"]
# A tensor with any other field (typed data, segments, a location of its own) is left to the ordinary checks.
_CUTTABLE_FIELDS = frozenset(
    _TENSOR[name] for name in ("dims", "data_type", "name", "raw_data", "doc_string", "metadata_props")
)
# Types whose elements numpy can view in place.
_CUTTABLE_TYPES = frozenset(
    [
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.INT8,
        TensorProto.INT16,
        TensorProto.INT32,
        TensorProto.INT64,
        TensorProto.UINT8,
        TensorProto.UINT16,
        TensorProto.UINT32,
        TensorProto.UINT64,
    ]
)


class Buffer(Protocol):
    """``bytes`` or a mapped file."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: slice, /) -> bytes: ...


class Span(NamedTuple):
    """A range of bytes of the model file."""

    offset: int
    length: int


@dataclass(frozen=True)
class Detached:
    """A model message without its large weights.

    In the message a cut-out tensor is external, at the location ``token``. The token is drawn after the file
    was written, so no tensor of the file can claim to be cut out.

    Attributes:
        message: Serialized ModelProto.
        token: The location of what was cut out.
    """

    message: bytes
    token: str

    def span(self, tensor: onnx.TensorProto) -> Span | None:
        """Return where in the model file the data of a cut-out tensor is, None for every other tensor."""
        entries = {e.key: e.value for e in tensor.external_data}
        if tensor.data_location != TensorProto.EXTERNAL or entries.get("location") != self.token:
            return None
        return Span(int(entries["offset"]), int(entries["length"]))


class _NoMessageError(ValueError):
    """The bytes cannot be taken apart into fields."""


class _Field(NamedTuple):
    """One field: its number and wire type, where its key starts, and where its payload is."""

    number: int
    wire: int
    start: int
    payload: int
    end: int


def detach(data: Buffer, threshold: int = CUT_ABOVE_BYTES) -> Detached:
    """Cut the large weights of the main graph out of a serialized model.

    What cannot be taken apart is left whole, for the parser to judge.

    Args:
        data: Content of the model file.
        threshold: Data of at most this many bytes stay in the message.
    """
    token = secrets.token_hex(16)
    if sys.byteorder != "little" or len(data) <= threshold:
        return Detached(data[:], token)
    try:
        message = b"".join(_Cutter(data, threshold, token).model())
    except _NoMessageError:
        message = data[:]
    return Detached(message, token)


class _Cutter:
    """Walks over one model; ``model`` yields the parts of the message without weights."""

    def __init__(self, data: Buffer, threshold: int, token: str) -> None:
        self._data, self._threshold, self._token = data, threshold, token
        self._walked = 0

    def model(self) -> Iterator[bytes]:
        for field in self._fields(0, len(self._data)):
            if (field.number, field.wire) == (GRAPH, _LENGTH):
                yield _enclosed(GRAPH, b"".join(self._graph(field)))
            else:
                yield self._data[field.start : field.end]

    def _graph(self, graph: _Field) -> Iterator[bytes]:
        kept = graph.payload  # fields that stand side by side are copied at once
        for field in self._fields(graph.payload, graph.end):
            if (field.number, field.wire) != (INITIALIZER, _LENGTH):
                continue
            if field.end - field.payload > self._threshold and (tensor := self._tensor(field)) is not None:
                yield self._data[kept : field.start]
                yield _enclosed(INITIALIZER, tensor)
                kept = field.end
        yield self._data[kept : graph.end]

    def _tensor(self, tensor: _Field) -> bytes | None:
        """Return the message of a tensor without its data, or None if they stay."""
        fields = []
        for field in self._fields(tensor.payload, tensor.end):
            fields.append(field)
            # Also ends the walk over data that are stored as one field an element.
            if field.number not in _CUTTABLE_FIELDS or len(fields) > _LARGEST_TENSOR:
                return None
        raw = [f for f in fields if f.number == RAW_DATA]
        types = [self._number(f) for f in fields if (f.number, f.wire) == (_DATA_TYPE, _VARINT)]
        if len(raw) != 1 or raw[0].wire != _LENGTH or len(types) != 1 or types[0] not in _CUTTABLE_TYPES:
            return None
        span = Span(raw[0].payload, raw[0].end - raw[0].payload)
        if span.length <= self._threshold:
            return None
        rest = b"".join(self._data[f.start : f.end] for f in fields if f.number != RAW_DATA)
        return rest + _reference(self._token, span)

    def _number(self, field: _Field) -> int:
        return _varint(self._data, field.payload, field.end)[0]

    def _fields(self, start: int, end: int) -> Iterator[_Field]:
        """Walk over the fields of one message.

        Raises:
            _NoMessageError: A field runs over ``end`` or is of a kind that ONNX does not use (groups), or there
                are more fields than any model within the budgets has.
        """
        while start < end:
            self._walked += 1
            key, payload = _varint(self._data, start, end)
            number, wire = key >> 3, key & 7
            if wire == _VARINT:
                stop = _varint(self._data, payload, end)[1]
            elif wire == _LENGTH:
                length, payload = _varint(self._data, payload, end)
                stop = payload + length
            else:
                stop = payload + _FIXED_BYTES.get(wire, len(self._data))
            if stop > end or not 1 <= number <= _LARGEST_NUMBER or self._walked > _MOST_FIELDS:
                raise _NoMessageError
            yield _Field(number, wire, start, payload, stop)
            start = stop


def _varint(data: Buffer, start: int, end: int) -> tuple[int, int]:
    """Return the number at ``start`` and the position behind it.

    Raises:
        _NoMessageError: It is cut off by ``end``, or is longer than 64 bits.
    """
    value = 0
    for k, byte in enumerate(data[start : min(end, start + _VARINT_BYTES)]):
        value |= (byte & 0x7F) << (7 * k)
        if byte < _CONTINUED:
            if value >= _VARINT_LIMIT:
                break
            return value, start + k + 1
    raise _NoMessageError


def _reference(token: str, span: Span) -> bytes:
    """Return the fields that say where the data of a tensor are."""
    reference = onnx.TensorProto(data_location=TensorProto.EXTERNAL)
    for key, value in (("location", token), ("offset", str(span.offset)), ("length", str(span.length))):
        reference.external_data.add(key=key, value=value)
    message: bytes = reference.SerializeToString()
    return message


def _enclosed(number: int, payload: bytes) -> bytes:
    """Return a length-delimited field."""
    return field_head(number, len(payload)) + payload
