"""Rotate what passes between a decoder's layers, so that no channel stands out (QuaRot)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import FreshNames, constant_array, is_op, node_label, rank
from bitwright.compiler.graph.operands import table_of
from bitwright.compiler.llama.decoder import Attention, Decoder, Layer
from bitwright.compiler.llama.parts import Linear, Norm
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.rounding.hadamard import spreading_matrix
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, graph_of, set_input

MARK = "rotate_residual"
ONLINE = "rotate_residual.online"
MOVING = ("Add", "Cast", "Concat", "Expand", "Identity", "Reshape", "Transpose", "Unsqueeze")
FIX = "leave 'rotate' out of the recipe"

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class RotateResidual:
    """Multiply the residual stream of a llama decoder by an orthogonal matrix Q that is folded into the weights.

    RMS normalization without gains commutes with a rotation (Ashkboos et al. 2024, "SliceGPT", section 3.1), so
    gains are folded into the linear layers behind first. Then the embedding and what is added to the stream is
    multiplied by Q, what reads it by Q^T (Ashkboos et al. 2024, "QuaRot", section 4, stage 1a); values are rotated
    head by head and rotated back by the output layer (stage 1d). Nothing of it costs anything when the model runs. What
    the down projection reads is a product of two branches through which no rotation passes: there blocks of it are
    multiplied by a Hadamard matrix at run time (stage 1c, in blocks), if that is wanted. Values that leave the graph
    as a cache are not rotated: what is cached keeps its meaning.

    Exact up to the rounding of float32. An embedding that shares its weight with the head is stored twice from then
    on: the head has taken the last gains.

    Attributes:
        seed: Of the random signs.
        down_block: Neighbouring channels in front of a down projection that are rotated at run time; 0 for none.
    """

    name: ClassVar[str] = "rotate_residual"

    seed: int = 0
    down_block: int = 0

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place.

        Raises:
            ModelError: It is no llama decoder, or gains or weights are shared in a way that cannot be folded.
        """
        if any(MARK in node.meta for node in model.graph):
            return PassResult(model, 0, ("rotated before",))
        decoder = recognise(model)
        _check_unshared(decoder)
        _check_blocks(decoder, self.down_block)
        edit = _Edit(fresh_names(model), spreading_matrix(decoder.hyper.width, self.seed), self)
        for layer in decoder.layers:
            edit.layer(layer)
        edit.readers(decoder.norm, [decoder.head])
        edit.embedding(decoder)
        edit.ones(decoder)
        decoder.head.node.meta[MARK] = True
        layers = len(decoder.layers)
        notes = [f"{decoder.hyper.width} channels of the residual stream rotated in {layers} layers"]
        if decoder.tied:
            notes.append("embedding and head had one weight and now have two")
        return PassResult(model, layers, tuple(notes))


def online_products(model: ir.Model) -> list[str]:
    """Return the products by which the pass rotates at run time; they must stay float."""
    return [node_label(node) for node in model.graph if ONLINE in node.meta]


@dataclass(frozen=True)
class _Edit:
    names: FreshNames
    rotation: Float64
    options: RotateResidual

    def layer(self, layer: Layer) -> None:
        attention = layer.attention
        self.readers(layer.attention_norm, [attention.query, attention.key])
        self.values(layer.attention_norm, attention)
        self.readers(layer.feed_forward_norm, [layer.gate, layer.up])
        self.down(layer.down)

    def readers(self, norm: Norm, linears: Iterable[Linear]) -> None:
        """Fold a normalization's gains into what reads it, and the rotation of the stream."""
        for linear in linears:
            self.store(linear, self.folded(norm, linear))

    def folded(self, norm: Norm, linear: Linear) -> Float64:
        """Return a weight (outputs, inputs) that reads the rotated stream without gains."""
        found: Float64 = (linear.matrix() * norm.weight.astype(np.float64)) @ self.rotation
        return found

    def values(self, norm: Norm, attention: Attention) -> None:
        """Rotate each value head, and back in the output layer, which writes to the rotated stream."""
        head = spreading_matrix(attention.width, self.options.seed + 1)
        value, output = self.folded(norm, attention.value), attention.output.matrix().astype(np.float64)
        if _leaves_graph(attention.value):
            self.store(attention.value, value)
            self.written(attention.output, output)
            return
        bias = attention.value.bias
        turned = None if bias is None else _by_head(head.T, bias)
        self.store(attention.value, _by_head(head.T, value), turned)
        self.written(attention.output, _by_head(head.T, output.T).T)

    def down(self, linear: Linear) -> None:
        weight = linear.matrix().astype(np.float64)
        if self.options.down_block:
            block = spreading_matrix(self.options.down_block, self.options.seed + 2)
            weight = _by_head(block.T, weight.T).T
            self.online(linear, block)
        self.written(linear, weight)

    def written(self, linear: Linear, weight: Float64) -> None:
        """Store a weight (outputs, inputs) whose results are added to the rotated stream."""
        bias = None if linear.bias is None else linear.bias.astype(np.float64) @ self.rotation
        self.store(linear, self.rotation.T @ weight, bias)

    def embedding(self, decoder: Decoder) -> None:
        """Rotate the rows that tokens look up."""
        table = constant_array(decoder.embedding)
        assert table is not None, "recognise() found a constant table"
        rotated = (table.astype(np.float64) @ self.rotation).astype(table.dtype)
        readers = [n for n, _ in decoder.embedding.uses() if table_of(n) is decoder.embedding]
        stored = add_initializer(
            graph_of(readers[0]), self.names(f"{decoder.embedding.name}_rotated"), rotated
        )
        for node in readers:
            node.replace_input_with(0, stored)

    def ones(self, decoder: Decoder) -> None:
        """Set all gains to one, now that what reads the normalizations has taken them."""
        for source in {norm.source: None for norm in _norms(decoder)}:
            array = constant_array(source)
            assert array is not None, "gains are constant"
            for node, index in tuple(source.uses()):
                ones = add_initializer(
                    graph_of(node), self.names(f"{source.name}_folded"), np.ones_like(array)
                )
                node.replace_input_with(index, ones)

    def store(self, linear: Linear, weight: Float64, bias: Float64 | None = None) -> None:
        """Give a layer a weight (outputs, inputs), and a bias if it changed."""
        old = constant_array(linear.stored())
        assert old is not None, "a linear layer's weight is constant"
        array = (weight if linear.rows_first else weight.T).astype(old.dtype)
        stem = linear.stored().name or "weight"
        set_input(
            linear.node, 1, add_initializer(graph_of(linear.node), self.names(f"{stem}_rotated"), array)
        )
        if bias is not None and linear.bias is not None:
            node, index = _bias_operand(linear)
            name = self.names(f"{linear.label}_bias_rotated")
            set_input(node, index, add_initializer(graph_of(node), name, bias.astype(old.dtype)))

    def online(self, linear: Linear, block: Float64) -> None:
        """Multiply neighbouring channels of a layer's input by a matrix when the model runs."""
        data, node = linear.data, linear.node
        dims, width, size = rank(data), linear.shape()[1], len(block)
        assert dims is not None, "checked before the first edit"
        kept, stem, graph = [0] * (dims - 1), f"{linear.label}_blocks", graph_of(node)
        steps = (
            ("Reshape", np.array([*kept, width // size, size], np.int64)),
            ("MatMul", block.astype(np.float32)),
            ("Reshape", np.array([*kept, width], np.int64)),
        )
        value = data
        for op_type, constant in steps:
            operand = add_initializer(graph, self.names(f"{stem}_operand"), constant)
            step = ir.node(op_type, [value, operand], name=self.names(f"{stem}_{op_type}"))
            graph.insert_before(node, step)
            value = step.outputs[0]
            value.name, value.type = self.names(f"{stem}_{op_type}_out"), data.type
            if op_type == "MatMul":
                step.meta[ONLINE] = True
        value.shape = None if data.shape is None else data.shape.copy()
        set_input(node, 0, value)


def _by_head(matrix: Float64, rows: NDArray[np.floating]) -> Float64:
    """Multiply the rows of each head, ``len(matrix)`` of them, by a matrix from the left."""
    split = rows.astype(np.float64).reshape(-1, len(matrix), *rows.shape[1:])
    found: Float64 = np.einsum("ij,hj...->hi...", matrix, split).reshape(rows.shape)
    return found


def _bias_operand(linear: Linear) -> tuple[ir.Node, int]:
    """Return the node that adds a layer's bias, and which of its inputs the bias is."""
    node = linear.node
    if is_op(node, "Gemm") and len(node.inputs) > 2 and node.inputs[2] is not None:
        return node, 2
    for reader, _ in node.outputs[0].uses():
        index = next((k for k, v in enumerate(reader.inputs) if constant_array(v) is not None), None)
        if is_op(reader, "Add") and index is not None:
            return reader, index
    what = "its bias is not added right behind it"
    raise ModelError(what, where=f"node '{linear.label}'", fix=FIX)


def _leaves_graph(linear: Linear) -> bool:
    """Tell whether a layer's result, moved about, is an output of the graph: a cache, whose content must not change."""
    waiting, seen = [linear.node.outputs[0]], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return True
        seen.add(value)
        moved = (o for n, _ in value.uses() if is_op(n, *MOVING) for o in n.outputs)
        waiting.extend(v for v in moved if v not in seen)
    return False


def _norms(decoder: Decoder) -> list[Norm]:
    found = [n for layer in decoder.layers for n in (layer.attention_norm, layer.feed_forward_norm)]
    return [*found, decoder.norm]


def _check_unshared(decoder: Decoder) -> None:
    """Refuse gains, normalized values and looked-up tables that something else reads, too."""
    norms = _norms(decoder)
    for source, times in Counter(norm.source for norm in norms).items():
        if len(source.uses()) != times:
            what = "these gains are read by something that is no normalization of the decoder"
            raise ModelError(what, where=f"'{source.name}'", fix=FIX)
    for norm in norms:
        _check_private(norm.data, None)
    for layer in decoder.layers:
        attention = layer.attention
        for readers in ((attention.query, attention.key, attention.value), (layer.gate, layer.up)):
            _check_private(readers[0].data, [linear.node for linear in readers])


def _check_blocks(decoder: Decoder, block: int) -> None:
    """Refuse blocks that do not divide what the down projections read."""
    for layer in decoder.layers if block else ():
        width, known = layer.down.shape()[1], rank(layer.down.data) is not None
        if not known or width % block:
            what = (
                f"{width} channels are no multiple of blocks of {block}" if known else "its rank is unknown"
            )
            raise ModelError(what, where=f"input of '{layer.down.label}'", fix="choose another 'rotate_down'")


def _check_private(value: ir.Value, readers: list[ir.Node] | None) -> None:
    """Refuse a value that is rotated and that others, or the model's caller, want to read as it was."""
    others = [] if readers is None else [n for n, _ in value.uses() if n not in readers]
    foreign = next((node_label(n) for n in others if not is_op(n, "Shape", "Cast")), None)
    if foreign is not None or value.is_graph_output():
        reader = "the caller" if foreign is None else f"'{foreign}'"
        what = f"{reader} reads it, too, and would get it rotated"
        raise ModelError(what, where=f"'{value.name}'", fix=FIX)
