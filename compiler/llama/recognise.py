"""From a graph to a decoder: the path from the logits back to the embedding, one layer after the other."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import constant_array
from bitwright.compiler.graph.operands import table_of
from bitwright.compiler.llama.decoder import Attention, Decoder, Layer
from bitwright.compiler.llama.following import (
    FIX,
    axes_of,
    expect,
    last_sizes,
    made_by,
    permutation,
    refuse,
    through,
    unscaled,
)
from bitwright.compiler.llama.parts import Linear, Norm, expect_linear, expect_norm, linear
from bitwright.compiler.llama.rotary import check_alike, frequencies, rotation

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
    stream: ir.Value | None = norm.data
    layers: list[Layer] = []
    while not _is_look_up(stream):
        layer, stream = _layer(stream)
        layers.append(layer)
    if not layers:
        refuse("at least one decoder layer", norm.data)
    layers.reverse()
    look_up = expect(through(stream, "Cast"), "the look-up of token embeddings", "Gather")
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


def _is_look_up(value: ir.Value | None) -> bool:
    node = made_by(through(value, "Cast"), "Gather")
    return node is not None and table_of(node) is not None


def _tied(table: ir.Value, head: Linear) -> bool:
    """Tell whether the head multiplies with the embedding, be it a copy."""
    array = constant_array(table)
    return array is not None and array.shape == head.shape() and np.array_equal(array, head.matrix())


def _branch(value: ir.Value | None, what: str) -> tuple[Linear, ir.Value]:
    """Return the linear layer and the residual stream that an addition joins."""
    node = expect(through(value, "Cast"), what, "Add")
    for branch, stream in (node.inputs[::-1], node.inputs):
        found = linear(branch)
        if found is not None and stream is not None:
            return found, stream
    return refuse(f"{what} with a linear layer as one operand", value)


def _layer(value: ir.Value | None) -> tuple[Layer, ir.Value]:
    """Return the layer that ends in a value, and the stream that enters it."""
    down, middle = _branch(value, "the residual addition behind a feed-forward part")
    gate, up = _swiglu(down)
    feed_forward_norm = _shared_norm((gate, up), middle)
    output, stream = _branch(middle, "the residual addition behind attention")
    attention = _attention(output)
    norm = _shared_norm((attention.query, attention.key, attention.value), stream)
    return Layer(norm, attention, feed_forward_norm, gate, up, down), stream


def _shared_norm(readers: tuple[Linear, ...], stream: ir.Value) -> Norm:
    """Return the normalization of the stream that several linear layers read."""
    found = expect_norm(readers[0].data)
    for reader in readers[1:]:
        if through(reader.data, "Cast") is not through(readers[0].data, "Cast"):
            refuse(
                "a linear layer that reads the same normalization as its neighbours", reader.node.outputs[0]
            )
    if through(found.data, "Cast") is not through(stream, "Cast"):
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
    turned = expect(
        through(output.data, "Reshape", "Cast"), "heads moved back behind the positions", "Transpose"
    )
    if tuple(permutation(turned)) != (0, 2, 1, 3):
        refuse("heads moved back behind the positions (perm 0, 2, 1, 3)", output.data)
    mixed = expect(turned.inputs[0], "the product of probabilities and values", "MatMul")
    softmax = expect(through(mixed.inputs[0], "Cast"), "a Softmax over the scores", "Softmax")
    query_side, key_side, scale = _scores(softmax.inputs[0])
    turn = rotation(query_side)
    key_turn = rotation(_one_head_each(key_side))
    query, heads, width = _heads(turn.data)
    key, key_heads, key_width = _heads(key_turn.data)
    value, value_heads, value_width = _heads(_one_head_each(mixed.inputs[1]))
    if (key_heads, key_width, value_width) != (value_heads, width, width) or heads % key_heads:
        refuse(
            "as many value heads as key heads, a divisor of the query heads, all of one width,",
            turned.inputs[0],
        )
    if not math.isclose(scale, width**-0.5, rel_tol=SCALE_TOLERANCE):
        refuse(
            f"scores scaled by {width**-0.5:.6g} (1 / sqrt of the head's width), not {scale:.6g},",
            softmax.inputs[0],
        )
    found = frequencies(turn)
    check_alike(found, frequencies(key_turn), 0)
    return Attention(query, key, value, output, heads, key_heads, width, found)


def _scores(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None, float]:
    """Return queries, keys (not transposed) and the constant factor of the scores behind a mask."""
    product, scale = unscaled(value)
    for operand in _masked(product):
        inner, factor = unscaled(operand)
        node = made_by(inner, "MatMul")
        if node is not None:
            queries, of_queries = unscaled(node.inputs[0])
            keys, of_keys = unscaled(node.inputs[1])
            swap = expect(keys, "keys with positions and elements swapped", "Transpose")
            if tuple(permutation(swap)) != (0, 1, 3, 2):
                refuse("keys with positions and elements swapped", keys)
            plain, of_plain = unscaled(swap.inputs[0])
            return queries, plain, scale * factor * of_queries * of_keys * of_plain
    return refuse("scores: queries times keys, scaled and masked", value)


def _masked(value: ir.Value | None) -> tuple[ir.Value | None, ...]:
    """Return what may be the scores: the operands of a mask's addition or selection, or the value itself."""
    node = made_by(value, "Add", "Where")
    if node is None:
        return (value,)
    return tuple(node.inputs[1:]) if node.op_type == "Where" else tuple(node.inputs)


def _one_head_each(value: ir.Value | None) -> ir.Value | None:
    """Return keys or values before their heads were repeated and before the cache was put in front."""
    value = through(value, "Cast")
    steps: tuple[Callable[[ir.Value | None], ir.Value | None], ...] = (
        _not_repeated,
        _without_cache,
        _not_repeated,
    )
    for step in steps:
        value = step(value)
    return value


def _not_repeated(value: ir.Value | None) -> ir.Value | None:
    """Return a value before Unsqueeze, Expand and Reshape repeated each head."""
    reshape = made_by(value, "Reshape")
    expand = None if reshape is None else made_by(reshape.inputs[0], "Expand", "Tile")
    spread = None if expand is None else made_by(expand.inputs[0], "Unsqueeze")
    if spread is None:
        return value
    if axes_of(spread) not in ((2,), (-3,)):
        refuse("heads that are repeated one by one", value)
    return spread.inputs[0]


def _without_cache(value: ir.Value | None) -> ir.Value | None:
    """Return the new part of what is appended to a cache, a graph input."""
    node = made_by(value, "Concat")
    if node is None or len(node.inputs) != 2:
        return value
    past = through(node.inputs[0], "Cast")
    return node.inputs[1] if past is not None and past.is_graph_input() else value


def _heads(value: ir.Value | None) -> tuple[Linear, int, int]:
    """Return the linear layer behind heads, their number and their width."""
    turned = expect(through(value, "Cast"), "heads moved before the positions", "Transpose")
    if tuple(permutation(turned)) != (0, 2, 1, 3):
        refuse("heads moved before the positions (perm 0, 2, 1, 3)", value)
    split = expect(turned.inputs[0], "a linear layer's result cut into heads", "Reshape")
    sizes = last_sizes(split.inputs[1], 2)
    found = expect_linear(split.inputs[0], "a linear layer before the heads")
    outputs = found.shape()[0]
    heads, width = sizes if sizes is not None else (-1, -1)
    heads = outputs // width if heads == -1 and width > 0 else heads
    width = outputs // heads if width == -1 and heads > 0 else width
    if heads < 1 or heads * width != outputs:
        refuse("a constant number of heads", turned.inputs[0])
    return found, heads, width


def _check_layers(layers: list[Layer], norm: Norm) -> None:
    """Refuse layers that differ in what GGUF states once for all of them."""
    first = layers[0]
    for number, layer in enumerate(layers):
        check_alike(first.attention.frequencies, layer.attention.frequencies, number)
        sizes = [
            (a.heads, a.key_heads, a.width, x.gate.shape(), x.up.shape(), x.down.shape()[::-1])
            for x, a in ((first, first.attention), (layer, layer.attention))
        ]
        epsilons = {layer.attention_norm.epsilon, layer.feed_forward_norm.epsilon, norm.epsilon}
        if sizes[0] != sizes[1] or sizes[0][3] != sizes[0][4] or epsilons != {first.attention_norm.epsilon}:
            msg = f"layer {number} has other sizes or another epsilon than layer 0"
            raise ModelError(msg, where=f"node '{layer.down.label}'", fix=FIX)
