"""Write the attention of a decoder's layer as one com.microsoft.GroupQueryAttention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.decoding.context import stated_context
from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.model import FreshNames, constant_array, is_op, rank
from bitwright.compiler.llama.attention import Core, core_of
from bitwright.compiler.llama.following import through
from bitwright.compiler.llama.rotary import check_alike, frequencies, source_of
from bitwright.compiler.llama.window import Sight
from bitwright.passes.contract import PassResult
from bitwright.passes.head_norms import FIRST_OPSET, normalized_heads
from bitwright.passes.narrow_cache import compute_in_half
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.rewriting import add_initializer, fresh_names, take_over

DOMAIN = "com.microsoft"
SIGHT = "fuse_decoder_attention.sight"
# ONNX Runtime refuses heads of other widths once it rotates them itself.
WIDTH_STEP = 16
# Bytes of both tables together. Without tables the angles of all positions are computed for every token.
LARGEST_TABLES = 32 << 20
FUNCTIONS = {"Cos": np.cos, "Sin": np.sin}
INT32, FLOAT, FLOAT16 = ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.FLOAT16


@dataclass(frozen=True)
class FuseDecoderAttention:
    """Scores, mask, Softmax, mixing, rotary positions and the appending of the cache become one operator a layer.

    They may be spelled out, or be opset 23's Attention behind a rotation. What makes queries, keys and values, and
    what reads the result, may be anything, so quantized models are rewritten like float ones. Inputs and outputs of the
    graph stay as they are. The pass sees that masks depend on sizes alone; that they are causal, and that positions
    count from the cache's length, is for its caller to prove by running both models; ``sights`` tells how far. Norms of
    query and key heads stay in front of the operator, windows of attention become its own. Layers are rewritten all or
    none: half a rewrite would keep the masks and the tables, too.
    """

    name: ClassVar[str] = "fuse_decoder_attention"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        ends = [n for n in model.graph if _ends_attention(n)]
        if not ends:
            return PassResult(model, 0)
        try:
            cores = [core_of(n.outputs[0]) for n in ends]
            obstacle = next(_obstacles(cores, model.opset_imports.get("", 0)), None)
        except ModelError as error:
            obstacle = f"{error.where}: {error.what}"
            cores = []
        if obstacle is not None:
            return PassResult(model, 0, (obstacle,))
        writer = _Writer(model.graph, fresh_names(model), cores, stated_context(model))
        for core in cores:
            writer.rewrite(core)
        model.opset_imports.setdefault(DOMAIN, 1)
        RemoveUnused().run(model)
        return PassResult(model, len(cores))


def sights(model: ir.Model) -> list[Sight]:
    """Return what the masks of the attentions that the pass rewrote let a position see."""
    return [node.meta[SIGHT] for node in model.graph if SIGHT in node.meta]


def _ends_attention(node: ir.Node) -> bool:
    """Tell whether a node may give the mixed values of an attention that this operator could compute."""
    if is_op(node, "Attention"):
        return rank(node.outputs[0]) == 3
    turned = _maker(node.inputs[0], "Transpose") if is_op(node, "Reshape") else None
    # Exporters that broadcast the product's batch and heads give it its shape once more.
    source = None if turned is None else _maker(through(turned.inputs[0], "Reshape"), "MatMul", "Attention")
    return source is not None and (is_op(source, "Attention") or _are_shares(source.inputs[0]))


def _maker(value: ir.Value | None, *ops: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if is_op(node, *ops) else None


def _are_shares(value: ir.Value | None) -> bool:
    """Tell whether a value comes from a Softmax, converted or with undefined rows set to zero."""
    while (node := _maker(value, "Cast", "Where")) is not None:
        value = node.inputs[-1]
    return _maker(value, "Softmax") is not None


def _obstacles(cores: list[Core], opset: int) -> Iterator[str]:
    """Yield why the operator does not compute these attentions.

    Raises:
        ModelError: A layer turns by other angles than the first.
    """
    if len({c.cache is None for c in cores}) > 1:
        yield "some layers have a cache and some have none"
    if opset < FIRST_OPSET and any(c.query_norm is not None for c in cores):
        yield f"heads are normalized, which is written in opset {FIRST_OPSET} and later, not {opset}"
    first = frequencies(cores[0].query_turn)
    for number, core in enumerate(cores):
        check_alike(first, frequencies(core.query_turn), number)
        check_alike(first, frequencies(core.key_turn), number)
        yield from (f"tensor '{core.result.name}': {why}" for why in _obstacles_of(core))


def _obstacles_of(core: Core) -> Iterator[str]:
    if core.width % WIDTH_STEP:
        yield f"heads of {core.width} elements, the operator rotates multiples of {WIDTH_STEP}"
    for value in (core.query, core.key, core.value):
        if rank(value) != 3 or value.dtype != FLOAT:
            yield f"'{value.name}' is not of shape (batch, length, elements) in float32"
    for turn in (core.query_turn, core.key_turn):
        for source in (core.mask, turn.cos, turn.sin):
            found = None if source is None else _reads_input(source)
            if found is not None:
                yield f"mask or positions depend on what is in the input '{found.name}', not on sizes alone"
    for past in () if core.cache is None else (core.cache.past_key, core.cache.past_value):
        if past.dtype not in (FLOAT, FLOAT16):
            yield f"the cache '{past.name}' holds {past.dtype}"
        if _heads_of(past) not in (None, core.key_heads):
            yield f"the cache '{past.name}' has {_heads_of(past)} heads, not {core.key_heads}"


def _heads_of(cache: ir.Value) -> int | None:
    heads = None if cache.shape is None else cache.shape[1]
    return heads if isinstance(heads, int) else None


def _reads_input(value: ir.Value) -> ir.Value | None:
    """Return the graph input whose content, not only its size, a value is computed from."""
    todo, seen = [value], {value}
    while todo:
        current = todo.pop()
        node = current.producer()
        if node is None and current.is_graph_input():
            return current
        if node is None or is_op(node, "Shape", "Size"):
            continue
        fresh = [v for v in node.inputs if v is not None and v not in seen]
        seen.update(fresh)
        todo.extend(fresh)
    return None


@dataclass(frozen=True)
class _Shared:
    """What all layers read.

    Attributes:
        last: Position of each sequence's last token, int32 [batch].
        total: Cached and new tokens, int32 scalar.
        cos, sin: Tables [positions, width / 2].
    """

    last: ir.Value
    total: ir.Value
    cos: ir.Value
    sin: ir.Value


def _products(core: Core, positions: int) -> NDArray[np.float32]:
    """Return the angles of all positions, rounded as the graph rounds them, shape (positions, width / 2)."""
    inverse = frequencies(core.query_turn).inverse.astype(np.float32)
    return np.arange(positions, dtype=np.float32)[:, None] * inverse[None]


class _Writer:
    """Writes the operators; what all layers read is written once, in front of the first that needs it."""

    def __init__(self, graph: ir.Graph, names: FreshNames, cores: list[Core], context: int | None) -> None:
        self._graph, self._names, self._context = graph, names, context
        node = cores[0].query.producer()
        assert node is not None, "queries are cut out of a computed value"
        self._new: list[ir.Node] = []
        self._shared = self._share(cores[0])
        graph.insert_after(node, self._new)

    def rewrite(self, core: Core) -> None:
        """Replace one layer's attention."""
        cache, s = core.cache, self._shared
        past = [None, None] if cache is None else [cache.past_key, cache.past_value]
        end = core.result.producer()
        assert end is not None, "an operator makes it"
        parts = ((core.query, core.query_norm), (core.key, core.key_norm), (core.value, None))
        rows = [
            v if norm is None else normalized_heads(self._graph, self._names, end, v, norm)
            for v, norm in parts
        ]
        inputs = [*rows, *past, s.last, s.total, s.cos, s.sin]
        attributes = {
            "num_heads": core.heads,
            "kv_num_heads": core.key_heads,
            "do_rotary": 1,
            "scale": core.scale,
        }
        if core.sight.window is not None:
            attributes["local_window_size"] = core.sight.window
        name = self._names(f"{end.name or core.result.name}_attention")
        node = ir.node("GroupQueryAttention", inputs, attributes, domain=DOMAIN, num_outputs=3, name=name)
        node.meta[SIGHT] = core.sight
        self._graph.insert_before(end, node)
        take_over(core.result, node.outputs[0])
        present = [None, None] if cache is None else [cache.present_key, cache.present_value]
        for old, new, part in zip(present, node.outputs[1:], ("key", "value"), strict=True):
            if old is None:
                new.name = self._names(f"{name}_{part}")
            else:
                take_over(old, new)
        if cache is not None and cache.past_key.dtype == FLOAT16:
            compute_in_half(node, self._names)

    def _share(self, core: Core) -> _Shared:
        sizes = self._op("Shape", [core.query], {"start": 0, "end": 2})
        batch, length = (
            self._op("Gather", [sizes, self._ints([0])]),
            self._op("Gather", [sizes, self._ints(1)]),
        )
        if core.cache is not None:
            held = self._op("Shape", [core.cache.past_key], {"start": 2, "end": 3})
            length = self._op("Add", [length, self._op("Squeeze", [held, self._ints([0])])])
        total = self._op("Cast", [length], {"to": INT32})
        ones = self._op("Cast", [self._ints(1)], {"to": INT32})
        last = self._op("Expand", [self._op("Sub", [total, ones]), batch])
        return _Shared(last, total, *self._tables(core, length))

    def _tables(self, core: Core, length: ir.Value) -> Iterator[ir.Value]:
        """Yield cosines and sines: the model's tables, those of its context, or of as many positions as there are."""
        turn = core.query_turn
        angles: ir.Value | None = None
        for value, function in ((turn.cos, "Cos"), (turn.sin, "Sin")):
            table = constant_array(source_of(value, function))
            if table is not None:
                # A spelled-out rotation reads each frequency twice, an operator for it once.
                rows = table.reshape(-1, table.shape[-1])[:, : core.width // 2]
                yield self._constant(f"rotary_{function.lower()}", rows.astype(np.float32))
                continue
            if self._context is not None and self._context * core.width * 4 <= LARGEST_TABLES:
                rows = FUNCTIONS[function](_products(core, self._context).astype(np.float64))
                yield self._constant(f"rotary_{function.lower()}", rows.astype(np.float32))
                continue
            if angles is None:
                angles = self._angles(core, length)
            yield self._op(function, [angles])

    def _angles(self, core: Core, length: ir.Value) -> ir.Value:
        inverse = frequencies(core.query_turn).inverse.astype(np.float32)[None]
        positions = self._op("Range", [self._ints(0), length, self._ints(1)])
        column = self._op("Unsqueeze", [self._op("Cast", [positions], {"to": FLOAT}), self._ints([1])])
        return self._op("Mul", [column, self._constant("rotary_frequencies", inverse)])

    def _constant(self, stem: str, array: np.ndarray) -> ir.Value:
        return add_initializer(self._graph, self._names(stem), array)

    def _ints(self, value: int | list[int]) -> ir.Value:
        return self._constant("attention_sizes", np.array(value, np.int64))

    def _op(
        self, op_type: str, inputs: list[ir.Value], attributes: dict[str, int | ir.DataType] | None = None
    ) -> ir.Value:
        plain = {k: int(v) for k, v in (attributes or {}).items()}
        name = self._names(f"attention_{op_type.lower()}")
        node = ir.node(op_type, inputs, plain, name=name)
        node.outputs[0].name = f"{name}_out"
        self._new.append(node)
        return node.outputs[0]
