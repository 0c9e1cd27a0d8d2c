"""From a graph to a decoder: the path from the logits back to the embedding, one layer after the other."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.graph.operands import table_of
from bitwright.compiler.llama.attention import core_of
from bitwright.compiler.llama.decoder import Attention, Decoder, Layer, norms_of
from bitwright.compiler.llama.following import (
    FIX,
    expect,
    made_by,
    refuse,
    through,
)
from bitwright.compiler.llama.parts import (
    Linear,
    Norm,
    Stream,
    expect_linear,
    expect_norm,
    linear,
    residual,
)
from bitwright.compiler.llama.rotary import check_alike, frequencies

CHOICES = ("Cast", "Slice", "Gather", "Unsqueeze", "Squeeze", "Reshape")
SCALE_TOLERANCE = 1e-3


def recognise(model: ir.Model) -> Decoder:
    """Find the parts of a llama decoder in a normalized model.

    Structure decides, names do not: the logits are the output that a linear layer makes; from there the path goes
    back over normalizations, residual additions, feed-forward parts and attention to the look-up of tokens.

    Args:
        model: Normalized (``passes.normalize``), not changed.

    Raises:
        ModelError: Something is not as in a llama decoder; the message names the node.
    """
    logits, head = _head(model)
    norm = expect_norm(through(head.data, *CHOICES))
    stream = norm.stream
    layers: list[Layer] = []
    while not _is_look_up(stream):
        layer, stream = _layer(stream)
        layers.append(layer)
    if not layers:
        refuse("at least one decoder layer", norm.data)
    layers.reverse()
    assert isinstance(stream, ir.Value), "a sum is no look-up"
    look_up = expect(stream, "the look-up of token embeddings", "Gather")
    table, tokens = table_of(look_up), through(look_up.inputs[1], "Cast")
    if table is None or tokens is None or not tokens.is_graph_input():
        refuse("a look-up of token numbers, a graph input,", stream)
    _check_layers(layers, norm)
    return Decoder(tokens, logits, table, tuple(layers), norm, head, _tied(table, head))


def _head(model: ir.Model) -> tuple[ir.Value, Linear]:
    for output in model.graph.outputs:
        found = linear(through(output, *CHOICES))
        if found is not None:
            if found.bias is not None:
                refuse("a head without bias", output)
            return output, found
    msg = "not a llama decoder: no output is made by a linear layer (the logits)"
    raise ModelError(msg, where="graph outputs", fix=FIX)


def _is_look_up(stream: Stream) -> bool:
    node = made_by(stream, "Gather") if isinstance(stream, ir.Value) else None
    return node is not None and table_of(node) is not None


def _tied(table: ir.Value, head: Linear) -> bool:
    """Tell whether the head multiplies with the embedding, be it a copy."""
    array = constant_array(table)
    return array is not None and array.shape == head.shape() and np.array_equal(array, head.matrix())


def _branch(stream: Stream, what: str) -> tuple[Linear, Stream]:
    """Return the linear layer and the residual stream that an addition joins."""
    node = expect(stream, what, "Add") if isinstance(stream, ir.Value) else stream
    operands = node.inputs[:2]
    for branch, rest in (operands[::-1], operands):
        found = linear(branch)
        if found is not None and rest is not None:
            return found, residual(rest)
    return refuse(f"{what} with a linear layer as one operand", node.outputs[0])


def _layer(stream: Stream) -> tuple[Layer, Stream]:
    """Return the layer that ends in a stream, and the stream that enters it."""
    down, middle = _branch(stream, "the residual addition behind a feed-forward part")
    gate, up = _swiglu(down)
    feed_forward_norm = _shared_norm((gate, up), middle)
    output, start = _branch(middle, "the residual addition behind attention")
    found = _attention(output)
    norm = _shared_norm((found.query, found.key, found.value), start)
    return Layer(norm, found, feed_forward_norm, gate, up, down), start


def _shared_norm(readers: tuple[Linear, ...], stream: Stream) -> Norm:
    """Return the normalization of the stream that several linear layers read."""
    found = expect_norm(readers[0].data)
    for reader in readers[1:]:
        if through(reader.data, "Cast") is not through(readers[0].data, "Cast"):
            refuse(
                "a linear layer that reads the same normalization as its neighbours", reader.node.outputs[0]
            )
    if found.stream is not stream:
        refuse("a normalization of the residual stream", readers[0].data)
    return found


def _swiglu(down: Linear) -> tuple[Linear, Linear]:
    """Return gate and up of ``down(silu(gate) * up)``."""
    node = expect(through(down.data, "Cast"), "the product silu(gate) * up", "Mul")
    for activated, other in (node.inputs, node.inputs[::-1]):
        gated = _silu(through(activated, "Cast"))
        if gated is not None:
            gate, up = expect_linear(gated, "the gate's linear layer"), expect_linear(other, "the up layer")
            return gate, up
    return refuse("the product silu(gate) * up", down.data)


def _silu(value: ir.Value | None) -> ir.Value | None:
    """Return x if a value is x * sigmoid(x)."""
    node = made_by(value, "Swish")
    if node is not None:
        return node.inputs[0] if node.attributes.get_float("alpha", 1.0) == 1.0 else None
    node = made_by(value, "Mul")
    for x, gate in (node.inputs, node.inputs[::-1]) if node is not None else ():
        sigmoid = made_by(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return x
    return None


def _attention(output: Linear) -> Attention:
    """Return the attention whose result the output layer reads."""
    core = core_of(output.data)
    width = core.width
    if not math.isclose(core.scale, width**-0.5, rel_tol=SCALE_TOLERANCE):
        refuse(
            f"scores scaled by {width**-0.5:.6g} (1 / sqrt of the head's width), not {core.scale:.6g},",
            core.result,
        )
    found = frequencies(core.query_turn)
    check_alike(found, frequencies(core.key_turn), 0)
    if 2 * len(found.inverse) != width:
        refuse("a rotation of whole heads", core.query_turn.data)
    query, key, value = (
        expect_linear(v, "a linear layer before the heads") for v in (core.query, core.key, core.value)
    )
    return Attention(
        query, key, value, output, core.heads, core.key_heads, width, found, core.cache, core.query_norm,
        core.key_norm, core.sight,
    )  # fmt: skip


def _check_layers(layers: list[Layer], norm: Norm) -> None:
    """Refuse layers that differ in what GGUF states once for all of them."""
    first = layers[0]
    for number, layer in enumerate(layers):
        check_alike(first.attention.frequencies, layer.attention.frequencies, number)
        sizes = [_sizes(x) for x in (first, layer)]
        epsilons = {n.epsilon for n in (*norms_of(layer), norm)}
        square = layer.gate.shape() == layer.up.shape() == layer.down.shape()[::-1]
        if sizes[0] != sizes[1] or not square or epsilons != {first.attention_norm.epsilon}:
            msg = f"layer {number} has other sizes or another epsilon than layer 0"
            raise ModelError(msg, where=f"node '{layer.down.label}'", fix=FIX)


def _sizes(layer: Layer) -> tuple[object, ...]:
    a = layer.attention
    return a.heads, a.key_heads, a.width, a.query_norm is None, layer.gate.shape()
