"""Give a decoder key-value caches of fixed capacity that new keys and values are written into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import ModelError, UsageError
from bitwright.compiler.graph.model import FreshNames, consumers, is_op, node_label
from bitwright.compiler.llama.decoder import Attention, Decoder
from bitwright.compiler.llama.parts import Linear, Norm
from bitwright.compiler.llama.recognise import recognise
from bitwright.passes.contract import PassResult
from bitwright.passes.fix_dims import FixDims
from bitwright.passes.head_norms import FIRST_OPSET, normalized_heads
from bitwright.passes.infer_shapes import InferShapes
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.rewriting import add_initializer, fresh_names, graph_of

DOMAIN, OPERATOR = "com.microsoft", "GroupQueryAttention"
PAST_LENGTH = "past_length"
SIGHT = "fix_cache.sight"
WIDTH_MULTIPLE = 16


@dataclass(frozen=True)
class FixCache:
    """Replace each attention of a llama decoder by GroupQueryAttention over caches of ``context`` positions.

    The model gets the inputs ``past_length``, int32 [1], and for every layer ``past_key_K`` and ``past_value_K``,
    float32 [1, key heads, context, width]; it returns the caches with the new rows written behind the first
    ``past_length`` ones. A cache that it had before, growing by concatenation, is gone, and the batch is 1. Rows behind
    those that are counted are never read, so a caller may keep the caches in one place and use them again.

    Attributes:
        context: Positions that the caches hold.
    """

    context: int
    name: ClassVar[str] = "fix_cache"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite; ``changed`` counts the attentions.

        Raises:
            ModelError: The model is no llama decoder in float32.
            UsageError: The context is longer than the model's table of positions.
        """
        if any(value.name == PAST_LENGTH for value in model.graph.inputs):
            return PassResult(model, 0)
        decoder = recognise(model)
        limit = decoder.layers[0].attention.frequencies.positions
        if limit is not None and self.context > limit:
            msg = f"the model's table holds {limit} positions, fewer than {self.context}"
            raise UsageError(msg, where="--context", fix=f"--context {limit} is the longest")
        width = decoder.layers[0].attention.width
        if width % WIDTH_MULTIPLE:
            msg = f"heads of {width} elements, where ONNX Runtime's attention takes multiples of {WIDTH_MULTIPLE}"
            raise ModelError(
                msg, where="--context", fix="compile it with the caches that it has, without --context"
            )
        _check_opset(model, decoder)
        _one_sequence(model, decoder)
        _Rewriter(model, decoder, self.context).rewrite()
        RemoveUnused().run(model)
        _drop_unread_inputs(model.graph)
        InferShapes().run(model)
        return PassResult(model, len(decoder.layers))


def telling_length(model: ir.Model) -> int:
    """Return how long sequences must be to show whether masks hid more than what follows, in a rewritten model."""
    return max((node.meta[SIGHT].largest + 2 for node in model.graph if SIGHT in node.meta), default=0)


def _check_opset(model: ir.Model, decoder: Decoder) -> None:
    """Refuse norms of heads in an opset that they cannot be written in."""
    opset = model.opset_imports.get("", 0)
    if decoder.hyper.head_norms and opset < FIRST_OPSET:
        msg = f"heads are normalized, which is written in opset {FIRST_OPSET} and later"
        raise ModelError(msg, where=f"opset {opset}", fix=f"export the decoder with opset {FIRST_OPSET}")


def _one_sequence(model: ir.Model, decoder: Decoder) -> None:
    """Fix the batch, the first dimension of the tokens, to 1."""
    shape = decoder.tokens.shape
    if shape is None or len(shape) != 2 or not isinstance(shape[1], ir.SymbolicDim) or shape[1].value is None:
        msg = f"tokens of shape {shape} are no [batch, length] with a length that has a name"
        raise ModelError(
            msg, where=f"input '{decoder.tokens.name}'", fix="export the model with dynamic lengths"
        )
    batch = shape[0]
    if isinstance(batch, ir.SymbolicDim):
        FixDims({batch.value or f"{decoder.tokens.name}:0": 1}).run(model)
    elif batch != 1:
        msg = f"a batch of {batch} sequences"
        raise ModelError(msg, where=f"input '{decoder.tokens.name}'", fix="export the model for a batch of 1")


class _Rewriter:
    """Walks the layers once."""

    def __init__(self, model: ir.Model, decoder: Decoder, context: int) -> None:
        self.model, self.graph, self.decoder, self.context = model, model.graph, decoder, context
        self.names: FreshNames = fresh_names(model)
        self.new_inputs: list[ir.Value] = []
        self.new_outputs: list[ir.Value] = []
        self.last: ir.Node | None = None
        shape = decoder.tokens.shape
        assert shape is not None, "the tokens' shape was checked"
        self.length = shape[1]

    def rewrite(self) -> None:
        """Replace every attention."""
        past = self.input(PAST_LENGTH, ir.DataType.INT32, (1,))
        counts = self.counts(past)
        first = self.decoder.layers[0].attention
        cos, sin = self.tables(first)
        for number, layer in enumerate(self.decoder.layers):
            self.attention(number, layer.attention, counts, (cos, sin))
        kept = [v for v in self.graph.inputs if v is self.decoder.tokens]
        others = [v for v in self.graph.inputs if v is not self.decoder.tokens]
        self.graph.inputs.clear()
        # What the model had beside its tokens goes if nobody reads it any more.
        self.graph.inputs.extend([*kept, *self.new_inputs, *others])
        logits = self.decoder.logits
        self.graph.outputs.clear()
        self.graph.outputs.extend([logits, *self.new_outputs])
        self.graph.opset_imports[DOMAIN] = 1

    def input(self, stem: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """Add a graph input."""
        value = ir.Value(name=self.names(stem), shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.new_inputs.append(value)
        return value

    def tables(self, attention: Attention) -> tuple[ir.Value, ir.Value]:
        """Return cosines and sines of every position's angles, float32 [context, width / 2]."""
        angles = np.arange(self.context)[:, None] * attention.frequencies.inverse[None, :]
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return (
            add_initializer(self.graph, self.names("rotary_cos"), cos),
            add_initializer(self.graph, self.names("rotary_sin"), sin),
        )

    def counts(self, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the index of the last position, int32 [1], and the number of positions, an int32 scalar."""
        tokens = self.decoder.tokens
        one = add_initializer(self.graph, self.names("one"), np.array([1], np.int32))
        axis = add_initializer(self.graph, self.names("first_axis"), np.array([0], np.int64))
        length = self.node("Shape", [tokens], "new_length", ir.DataType.INT64, (1,), start=1, end=2)
        narrow = self.node("Cast", [length], "new_length", ir.DataType.INT32, (1,), to=int(ir.DataType.INT32))
        total = self.node("Add", [past, narrow], "total_length", ir.DataType.INT32, (1,))
        last = self.node("Sub", [total, one], "last_position", ir.DataType.INT32, (1,))
        scalar = self.node("Squeeze", [total, axis], "total_length", ir.DataType.INT32, ())
        return last, scalar

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        stem: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        **attributes: int,
    ) -> ir.Value:
        """Put a node of one output in front of all others."""
        name = self.names(stem)
        node = ir.node(op_type, inputs, attributes, name=name)
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{name}_out", ir.TensorType(dtype), ir.Shape(shape)
        self.graph.insert_before(self.graph[0], node) if self.last is None else self.graph.insert_after(
            self.last, node
        )
        self.last = node
        return value

    def attention(
        self,
        number: int,
        found: Attention,
        counts: tuple[ir.Value, ir.Value],
        tables: tuple[ir.Value, ir.Value],
    ) -> None:
        """Replace one attention."""
        shape = (1, found.key_heads, self.context, found.width)
        caches = [self.input(f"past_{part}_{number}", ir.DataType.FLOAT, shape) for part in ("key", "value")]
        reader = found.output.node
        parts = ((found.query, found.query_norm), (found.key, found.key_norm), (found.value, None))
        rows = [self.rows(linear, norm, reader) for linear, norm in parts]
        attributes = {"num_heads": found.heads, "kv_num_heads": found.key_heads, "do_rotary": 1}
        window = found.sight.window
        if window is not None and window < self.context:
            attributes["local_window_size"] = window
        name = self.names(f"attention_{number}")
        operands = [*rows, *caches, *counts, *tables]
        node = ir.node(OPERATOR, operands, attributes, domain=DOMAIN, num_outputs=3, name=name)
        node.meta[SIGHT] = found.sight
        output, *presents = node.outputs
        output.name, output.type = f"{name}_out", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([1, self.length, found.heads * found.width])
        for value, part in zip(presents, ("key", "value"), strict=True):
            value.name = self.names(f"present_{part}_{number}")
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self.new_outputs += presents
        graph_of(reader).insert_before(reader, node)
        reader.replace_input_with(0, output)

    def rows(self, linear: Linear, norm: Norm | None, reader: ir.Node) -> ir.Value:
        """Return the queries, keys or values of all heads, normalized if they are."""
        found = _result(linear)
        return found if norm is None else normalized_heads(self.graph, self.names, reader, found, norm)


def _result(linear: Linear) -> ir.Value:
    """Return what a linear layer computes, its bias added.

    Raises:
        ModelError: It is no float32 [batch, length, width].
    """
    value = linear.node.outputs[0]
    if linear.bias is not None and is_op(linear.node, "MatMul"):
        (addition,) = consumers(value)
        value = addition.outputs[0]
    if value.dtype != ir.DataType.FLOAT or value.shape is None or len(value.shape) != 3:
        msg = f"a projection of {value.type}, shape {value.shape}; float32 [batch, length, width] is needed"
        raise ModelError(msg, where=f"node '{node_label(linear.node)}'", fix="export the decoder in float32")
    return value


def _drop_unread_inputs(graph: ir.Graph) -> None:
    """Remove the inputs that nobody reads: caches that were concatenated, masks and positions."""
    read = [v for v in graph.inputs if v.uses() or v.is_graph_output()]
    graph.inputs.clear()
    graph.inputs.extend(read)
