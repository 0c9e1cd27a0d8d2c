"""The decoder's arrays under GGUF's names, in GGUF's order of rows; and the way back into the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.llama.decoder import Decoder
from bitwright.compiler.llama.parts import Linear

Float32 = NDArray[np.float32]
Role = Literal[
    "token_embd", "output", "norm", "bias", "factors", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate",
    "ffn_up", "ffn_down",
]  # fmt: skip
MATRICES = (
    "token_embd",
    "output",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


def interleaved(rows: Float32, heads: int) -> Float32:
    """Return rows of a query or key matrix in the order that llama.cpp rotates.

    Exporters rotate element i of a head with element i + width / 2, llama.cpp neighbours: the first half of a head's
    rows goes to even places, the second to odd ones.

    Args:
        rows: Shape (heads * width, ...).
        heads: Number of heads.
    """
    split = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def in_halves(rows: Float32, heads: int) -> Float32:
    """Undo :func:`interleaved`."""
    split = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


@dataclass(frozen=True, eq=False)
class ModelTensor:
    """One tensor of the GGUF file and where the graph has it.

    Attributes:
        name: GGUF's name.
        role: What it is.
        layer: Number of the layer, or -1.
        shape: (rows, columns) or (elements,).
        load: Returns it as float32 in GGUF's order.
        readers: Linear layers that multiply with it.
        heads: Its rows belong to so many rotated heads; 0 if they are in the graph's order.
        tables: Initializers that hold it untransposed (the embedding).
    """

    name: str
    role: Role
    layer: int
    shape: tuple[int, ...]
    load: Callable[[], Float32]
    readers: tuple[Linear, ...] = ()
    heads: int = 0
    tables: tuple[ir.Value, ...] = ()

    @property
    def is_matrix(self) -> bool:
        """Whether it may be rounded; vectors stay F32."""
        return self.role in MATRICES

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return int(np.prod(self.shape))


def tensors_of(decoder: Decoder) -> tuple[ModelTensor, ...]:
    """Return all tensors of the file, the embedding first, in the order of the layers."""
    return tuple(_all(decoder))


def _all(decoder: Decoder) -> Iterator[ModelTensor]:
    table = constant_array(decoder.embedding)
    assert table is not None, "recognise() found a constant table"
    readers = (decoder.head,) if decoder.tied else ()
    yield ModelTensor(
        "token_embd.weight", "token_embd", -1, table.shape, lambda: table.astype(np.float32), readers,
        tables=(decoder.embedding,),
    )  # fmt: skip
    factors = decoder.hyper.factors
    if factors is not None:
        yield ModelTensor("rope_freqs.weight", "factors", -1, factors.shape, lambda: factors)
    for number in range(len(decoder.layers)):
        yield from _of_layer(decoder, number)
    yield _vector("output_norm.weight", "norm", -1, decoder.norm.weight)
    if not decoder.tied:
        yield _matrix("output.weight", "output", -1, decoder.head)


def _of_layer(decoder: Decoder, number: int) -> Iterator[ModelTensor]:
    layer, stem = decoder.layers[number], f"blk.{number}."
    a = layer.attention
    yield _vector(f"{stem}attn_norm.weight", "norm", number, layer.attention_norm.weight)
    for name, norm in (("attn_q_norm", a.query_norm), ("attn_k_norm", a.key_norm)):
        if norm is not None:
            yield _vector(f"{stem}{name}.weight", "norm", number, norm.weight)
    # qwen3 rotates heads as exporters do, so that rows stay in their order.
    plain = a.query_norm is not None
    roles: tuple[tuple[Role, Linear, int], ...] = (
        ("attn_q", a.query, 0 if plain else a.heads),
        ("attn_k", a.key, 0 if plain else a.key_heads),
        ("attn_v", a.value, 0),
        ("attn_output", a.output, 0),
    )
    for role, found, heads in roles:
        yield from _linear(f"{stem}{role}", role, number, found, heads)
    yield _vector(f"{stem}ffn_norm.weight", "norm", number, layer.feed_forward_norm.weight)
    rest: tuple[tuple[Role, Linear], ...] = (
        ("ffn_gate", layer.gate),
        ("ffn_up", layer.up),
        ("ffn_down", layer.down),
    )
    for role, found in rest:
        yield from _linear(f"{stem}{role}", role, number, found, 0)


def _linear(stem: str, role: Role, layer: int, found: Linear, heads: int) -> Iterator[ModelTensor]:
    yield _matrix(f"{stem}.weight", role, layer, found, heads)
    if found.bias is not None:
        bias = interleaved(found.bias, heads) if heads else found.bias
        yield _vector(f"{stem}.bias", "bias", layer, bias)


def _vector(name: str, role: Role, layer: int, values: Float32) -> ModelTensor:
    return ModelTensor(name, role, layer, values.shape, lambda: values.astype(np.float32))


def _matrix(name: str, role: Role, layer: int, found: Linear, heads: int = 0) -> ModelTensor:
    def load() -> Float32:
        return interleaved(found.matrix(), heads) if heads else found.matrix()

    return ModelTensor(name, role, layer, found.shape(), load, (found,), heads)


def in_graph(tensor: ModelTensor, values: Float32) -> dict[ir.Value, Float32]:
    """Return what the graph's initializers hold where a matrix of the file is read.

    Args:
        tensor: From :func:`tensors_of`.
        values: As in the file, shape ``tensor.shape``.

    Raises:
        InternalError: The tensor is no matrix, or its shape is another.
    """
    if not tensor.is_matrix or values.shape != tensor.shape:
        msg = f"'{tensor.name}' of shape {tensor.shape} cannot take values of shape {values.shape}"
        raise InternalError(msg)
    rows = in_halves(values, tensor.heads) if tensor.heads else values
    found = dict.fromkeys(tensor.tables, rows)
    for reader in tensor.readers:
        initializer = reader.stored()
        # Through a Transpose the initializer lies the other way round than the consumer sees it.
        turned = initializer is not reader.weight
        found.setdefault(
            initializer, rows if reader.rows_first is not turned else np.ascontiguousarray(rows.T)
        )
    return found


def put_back(tensor: ModelTensor, values: Float32) -> None:
    """Store a matrix of the file in the graph, wherever it is read."""
    for initializer, array in in_graph(tensor, values).items():
        initializer.const_value = ir.tensor(array, name=initializer.name)
