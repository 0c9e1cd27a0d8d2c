"""The core of grouped-query attention: from queries, keys and values to their mix, whatever makes and reads them."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bitwright.compiler.graph.model import consumers, is_op
from bitwright.compiler.llama.attention_operators import Fused, fused_attention
from bitwright.compiler.llama.decoder import Cache
from bitwright.compiler.llama.following import (
    axes_of,
    expect,
    last_sizes,
    made_by,
    permutation,
    refuse,
    scalar,
    through,
    unscaled,
)
from bitwright.compiler.llama.parts import Norm, linear, norm_of
from bitwright.compiler.llama.rotary import Rotation, rotation
from bitwright.compiler.llama.window import Sight, sight_of

HEADS_FIRST = (0, 2, 1, 3)
LAST_TWO_SWAPPED = (0, 1, 3, 2)
LAST_TWO_OF_THREE = (0, 2, 1)
HEADS_LAST_AXIS = 3


@dataclass(frozen=True, eq=False)
class Core:
    """One attention between its linear layers.

    Attributes:
        query: What is cut into query heads, shape (batch, length, heads * width).
        key, value: What is cut into key and value heads, shape (batch, length, key heads * width).
        result: The mixed values, shape (batch, length, heads * width).
        query_norm, key_norm: Normalize each head before it is rotated; None where nothing does.
        heads: Query heads.
        key_heads: Key and value heads.
        width: Elements of a head.
        scale: Factor of the scores.
        query_turn, key_turn: The rotary embeddings.
        mask: What is added to the scores or selects among them, or None.
        sight: What mask and operator let a position see.
        cache: None if the graph keeps none.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    result: ir.Value
    query_norm: Norm | None
    key_norm: Norm | None
    heads: int
    key_heads: int
    width: int
    scale: float
    query_turn: Rotation
    key_turn: Rotation
    mask: ir.Value | None
    sight: Sight
    cache: Cache | None


@dataclass(frozen=True, eq=False)
class _Operands:
    """What is multiplied, whichever operators do it.

    Attributes:
        query: How queries are rotated.
        key: How keys are rotated.
        value: The values of this call.
        scale: Factor of the scores; None is one over the root of the width.
        mask: What is added to the scores or selects among them, or None.
        cache: Where earlier positions come from, or None.
        counts: Heads of queries, keys and values, where an operator says it.
        window: Positions that an operator lets a position see; None for all.
    """

    query: Rotation
    key: Rotation
    value: ir.Value | None
    scale: float | None
    mask: ir.Value | None
    cache: Cache | None
    counts: tuple[int | None, int | None, int | None] = (None, None, None)
    window: int | None = None


@dataclass(frozen=True, eq=False)
class _Scores:
    queries: ir.Value | None
    keys: ir.Value | None
    scale: float
    mask: ir.Value | None


def core_of(result: ir.Value | None) -> Core:
    """Return the attention that makes a value.

    Args:
        result: Mixed values with the heads merged, shape (batch, length, heads * width).

    Raises:
        ModelError: Something else makes it; the message names the node where the path ends.
    """
    merged = through(result, "Cast")
    mixed = through(merged, "Reshape", "Cast")
    turned = made_by(mixed, "Transpose")
    if turned is not None:
        if tuple(permutation(turned)) != HEADS_FIRST:
            refuse("heads moved back behind the positions (perm 0, 2, 1, 3)", result)
        mixed = through(turned.inputs[0], "Reshape", "Cast")
    fused = fused_attention(mixed)
    if fused is None and turned is None:
        refuse("heads moved back behind the positions", mixed)
    assert merged is not None, "something was found behind it"
    return _core(_spelled_out(mixed) if fused is None else _from_operator(fused), merged)


def _spelled_out(value: ir.Value | None) -> _Operands:
    """Read a product of probabilities and values."""
    mixed = expect(value, "the product of probabilities and values", "MatMul")
    softmax = expect(_shares(mixed.inputs[0]), "a Softmax over the scores", "Softmax")
    scores = _scores(softmax.inputs[0])
    keys, key_store = _one_head_each(scores.keys)
    values, value_store = _one_head_each(mixed.inputs[1])
    cache = _cache(key_store, value_store)
    return _Operands(rotation(scores.queries), rotation(keys), values, scores.scale, scores.mask, cache)


def _from_operator(fused: Fused) -> _Operands:
    """Read an attention operator; the cache may be its own, or put in front of its operands."""
    keys, key_store = _one_head_each(fused.key)
    values, value_store = _one_head_each(fused.value)
    if fused.tables is None:
        query, key = rotation(_heads_apart(fused.query)), rotation(_heads_apart(keys))
    elif fused.query is None or keys is None:
        refuse("queries, keys and values as operands of their own", fused.node.outputs[0])
    else:
        query, key = (Rotation(v, *fused.tables, halves=True) for v in (fused.query, keys))
    cache = _cache(key_store, value_store) or _own_cache(fused)
    counts = fused.heads, fused.key_heads, fused.key_heads
    return _Operands(query, key, values, fused.scale, fused.mask, cache, counts, fused.window)


def _core(found: _Operands, result: ir.Value) -> Core:
    """Return the attention of operands that fit together.

    Raises:
        ModelError: They do not.
    """
    many, few, fewer = found.counts
    query = _heads(found.query.data, found.query.heads or many)
    key = _heads(found.key.data, found.key.heads or few)
    value = _heads(found.value, fewer)
    heads, key_heads, width = query.count, key.count, query.width
    if (key_heads, key.width, value.width) != (value.count, width, width) or heads % key_heads:
        refuse("as many value heads as key heads, a divisor of the query heads, all of one width,", result)
    if value.norm is not None or (query.norm is None) != (key.norm is None):
        refuse("queries and keys that are both normalized, or neither, and values that are not,", result)
    scale = width**-0.5 if found.scale is None else found.scale
    return Core(
        query.whole, key.whole, value.whole, result, query.norm, key.norm, heads, key_heads, width, scale,
        found.query, found.key, found.mask, _sight(found), found.cache,
    )  # fmt: skip


def _sight(found: _Operands) -> Sight:
    sight = sight_of(found.mask)
    if found.window is None:
        return sight
    # Both limit what is seen; usually there is one of them.
    window = found.window if sight.window is None else min(sight.window, found.window)
    return Sight(window, max(sight.largest, found.window))


def _scores(value: ir.Value | None) -> _Scores:
    """Return queries, keys (not transposed), the constant factor and the mask of the scores."""
    product, scale = unscaled(value)
    for operand, mask in _masked(product):
        inner, factor = unscaled(operand)
        node = made_by(inner, "MatMul")
        if node is not None:
            queries, of_queries = unscaled(node.inputs[0])
            keys, of_keys = unscaled(node.inputs[1])
            plain, of_plain = unscaled(_swapped_back(keys))
            return _Scores(queries, plain, scale * factor * of_queries * of_keys * of_plain, mask)
    return refuse("scores: queries times keys, scaled and masked", value)


def _shares(value: ir.Value | None) -> ir.Value | None:
    """Return probabilities before those of positions that see nothing at all were set to zero."""
    value = through(value, "Cast")
    node = made_by(value, "Where")
    test = None if node is None else made_by(node.inputs[0], "IsNaN")
    if node is None or test is None or test.inputs[0] is not node.inputs[2] or scalar(node.inputs[1]) != 0:
        return value
    return through(node.inputs[2], "Cast")


def _swapped_back(value: ir.Value | None) -> ir.Value | None:
    """Return keys before positions and elements were swapped, with four dimensions or with three.

    Raises:
        ModelError: They were not.
    """
    reshape = made_by(value, "Reshape")
    node = expect(
        value if reshape is None else reshape.inputs[0],
        "keys with positions and elements swapped",
        "Transpose",
    )
    wanted = LAST_TWO_SWAPPED if reshape is None else LAST_TWO_OF_THREE
    if tuple(permutation(node)) != wanted:
        refuse("keys with positions and elements swapped", value)
    if reshape is None:
        return node.inputs[0]
    joined = expect(node.inputs[0], "keys with batch and heads joined", "Reshape")
    # Where heads were repeated just before, one Reshape does both.
    repeated = made_by(joined.inputs[0], "Expand", "Tile") is not None
    return joined.outputs[0] if repeated else joined.inputs[0]


def _masked(value: ir.Value | None) -> tuple[tuple[ir.Value | None, ir.Value | None], ...]:
    """Return (what may be the scores, the mask): both readings of a mask's addition or selection."""
    node = made_by(value, "Add", "Where")
    if node is None:
        return ((value, None),)
    if node.op_type == "Where":
        return tuple((v, node.inputs[0]) for v in node.inputs[1:])
    first, second = node.inputs
    return ((first, second), (second, first))


def _one_head_each(value: ir.Value | None) -> tuple[ir.Value | None, ir.Node | None]:
    """Return keys or values before heads were repeated and the cache put in front, and the node that put it there."""
    value = _not_repeated(through(value, "Cast"))
    store = _appended(value)
    return _not_repeated(value if store is None else store.inputs[1]), store


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


def _appended(value: ir.Value | None) -> ir.Node | None:
    """Return the node that appends new keys or values to a cache, a graph input."""
    node = made_by(value, "Concat")
    if node is None or len(node.inputs) != 2:
        return None
    past = through(node.inputs[0], "Cast")
    return node if past is not None and past.is_graph_input() else None


def _cache(of_keys: ir.Node | None, of_values: ir.Node | None) -> Cache | None:
    """Return where a cache enters and leaves the graph, or None if there is none, or it never leaves."""
    if of_keys is None or of_values is None:
        return None
    past = [through(n.inputs[0], "Cast") for n in (of_keys, of_values)]
    present = [_output_of(n.outputs[0]) for n in (of_keys, of_values)]
    key, value = present
    if key is None or value is None:
        return None
    assert past[0] is not None and past[1] is not None, "an appended cache is a graph input"
    return Cache(past[0], past[1], key, value)


def _output_of(value: ir.Value) -> ir.Value | None:
    """Return the graph output that a value is, or is converted to."""
    if value.is_graph_output():
        return value
    converted = (n.outputs[0] for n in consumers(value) if is_op(n, "Cast", "Identity"))
    return next((v for v in converted if v.is_graph_output()), None)


def _own_cache(fused: Fused) -> Cache | None:
    """Return the cache that an operator appends to by itself."""
    (past_key, past_value), present = fused.past, [_output_of(v) for v in fused.present if v is not None]
    if past_key is None or past_value is None or len(present) != 2:
        return None
    key, value = present
    return None if key is None or value is None else Cache(past_key, past_value, key, value)


def _heads_apart(value: ir.Value | None) -> ir.Value | None:
    """Return heads before they were moved behind the positions and merged, which operators may ask for."""
    reshape = made_by(through(value, "Cast"), "Reshape")
    turned = None if reshape is None else made_by(reshape.inputs[0], "Transpose")
    return value if turned is None or tuple(permutation(turned)) != HEADS_FIRST else turned.inputs[0]


@dataclass(frozen=True, eq=False)
class _Heads:
    """Heads of queries, keys or values.

    Attributes:
        whole: What is cut into them, shape (batch, length, heads * width).
        count: Their number.
        width: Elements of one.
        norm: Normalizes each of them, or None.
    """

    whole: ir.Value
    count: int
    width: int
    norm: Norm | None = None


def _heads(value: ir.Value | None, count: int | None) -> _Heads:
    """Return what is cut into heads, and how.

    Args:
        value: Shape (batch, heads, length, width), or merged: (batch, length, heads * width).
        count: Number of heads where an operator says it, so that nothing need be cut.
    """
    value = through(_heads_apart(value), "Cast")
    behind = norm_of(value, HEADS_LAST_AXIS)
    moved = value if behind is None else through(behind.data, "Cast")
    if made_by(moved, "Transpose") is None and value is not None and count:
        return _merged(value, count)
    turned = expect(moved, "heads moved before the positions", "Transpose")
    if tuple(permutation(turned)) != HEADS_FIRST:
        refuse("heads moved before the positions (perm 0, 2, 1, 3)", value)
    before = norm_of(turned.inputs[0], HEADS_LAST_AXIS) if behind is None else None
    cut = turned.inputs[0] if before is None else through(before.data, "Cast")
    split = expect(cut, "a linear layer's result cut into heads", "Reshape")
    return _cut(split, behind or before, turned.inputs[0])


def _merged(value: ir.Value, count: int) -> _Heads:
    """Return heads that lie side by side, and were cut only to be normalized, if at all."""
    joined = made_by(value, "Reshape")
    norm = None if joined is None else norm_of(joined.inputs[0], HEADS_LAST_AXIS)
    if norm is None and joined is not None:
        # Heads one after the other, as many for each position: (batch, length * heads, width).
        norm = norm_of(joined.inputs[0])
    if norm is not None:
        split = expect(through(norm.data, "Cast"), "a linear layer's result cut into heads", "Reshape")
        return _cut(split, norm, value, count)
    outputs = _elements(value)
    if outputs < 1 or outputs % count:
        refuse("a constant number of heads", value)
    return _Heads(value, count, outputs // count)


def _cut(split: ir.Node, norm: Norm | None, reader: ir.Value | None, count: int | None = None) -> _Heads:
    """Return what a Reshape cuts into heads.

    Args:
        split: The Reshape.
        norm: Of the heads, or None.
        reader: What refusals name.
        count: Number of heads where an operator says it.
    """
    whole = split.inputs[0]
    sizes = last_sizes(split.inputs[1], 2)
    outputs = -1 if whole is None else _elements(whole)
    heads, width = sizes if sizes is not None else (-1, -1)
    heads = heads if count is None else count
    heads = outputs // width if heads == -1 and width > 0 else heads
    width = outputs // heads if width == -1 and heads > 0 else width
    if heads < 1 or width < 1 or whole is None or outputs not in (-1, heads * width):
        refuse("a constant number of heads", reader)
    if norm is not None and norm.weight.shape != (width,):
        refuse("a normalization of single heads", reader)
    return _Heads(whole, heads, width, norm)


def _elements(value: ir.Value) -> int:
    """Return the last size of a linear layer's result, -1 if it is unknown."""
    found = linear(value)
    if found is not None:
        return found.shape()[0]
    last = None if value.shape is None else value.shape[-1]
    return last if isinstance(last, int) else -1
