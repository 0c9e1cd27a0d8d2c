"""Keep the keys and values of earlier tokens in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import FreshNames, constant_array
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names, set_input

DOMAIN = "com.microsoft"
CacheType = Literal["float16", "int8", "int4"]
STORED: Mapping[CacheType, ir.DataType] = {
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.UINT8,
}
BITS: Mapping[CacheType, int] = {"int8": 8, "int4": 4}
LARGEST: Mapping[int, int] = {8: 127, 4: 7}
PAST, PRESENT, ROTARY, SCALES = (3, 4), (1, 2), (7, 8), (12, 13)
# In front of the attention computing in half precision: queries, keys and values (two are left out where packed).
QUERIES = (0, 1, 2)


def cache_type(name: str) -> CacheType:
    """Return the type of a cache by its name, which has been checked."""
    return next(known for known in STORED if known == name)


@dataclass(frozen=True)
class NarrowCache:
    """Give every GroupQueryAttention a cache of another type; the graph's past and present change type with it.

    Integers have one scale for every channel of every head, so that a channel with outliers spoils no other; new keys
    and values are rounded when they are appended, and the products read the integers. ONNX Runtime has no attention in
    float32 over a cache in float16: there attention itself computes in float16, between casts. Two 4-bit integers share
    a byte, so the last dimension of such a cache is half as long.

    Attributes:
        type: What is stored.
        magnitudes: Largest absolute value by graph input that holds a past, shape (key heads, width); integers only.
    """

    type: CacheType
    magnitudes: Mapping[str, NDArray[np.float32]]

    @property
    def name(self) -> str:
        """The pass's name."""
        return "narrow_cache"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        nodes = [n for n in model.graph if n.op_type == "GroupQueryAttention" and n.domain == DOMAIN]
        todo = [n for n in nodes if _is_float(n.inputs[PAST[0]])]
        names = fresh_names(model)
        for node in todo:
            if self.type == "float16":
                compute_in_half(node, names)
            else:
                self._store_integers(node, names)
            for value in (*(node.inputs[k] for k in PAST), *(node.outputs[k] for k in PRESENT)):
                assert value is not None, "keys and values are cached together"
                self._retype(value)
        return PassResult(model, len(todo))

    def _store_integers(self, node: ir.Node, names: FreshNames) -> None:
        bits = BITS[self.type]
        graph = node.graph
        assert isinstance(graph, ir.Graph), "an attention is in a graph"
        for k, past in zip(SCALES, PAST, strict=True):
            value = node.inputs[past]
            assert value is not None, "keys and values are cached together"
            largest = self.magnitudes[value.name or ""].astype(np.float32)
            # A channel that is always zero needs any scale but zero.
            scale = np.where(largest > 0, largest, 1.0) / LARGEST[bits]
            set_input(
                node,
                k,
                add_initializer(graph, names(f"{value.name}_scale"), scale.reshape(-1).astype(np.float32)),
            )
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)
        for part in "kv":
            node.attributes[f"{part}_quant_type"] = ir.AttrString(f"{part}_quant_type", "PER_CHANNEL")

    def _retype(self, value: ir.Value) -> None:
        # Setting the dtype would change the type object, which a copied model shares with the original.
        value.type = ir.TensorType(STORED[self.type])
        if self.type == "int4" and value.shape is not None and isinstance(value.shape[-1], int):
            value.shape = ir.Shape([*value.shape[:-1], (value.shape[-1] + 1) // 2])


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def compute_in_half(node: ir.Node, names: FreshNames) -> None:
    """Let an attention in float32 compute in float16, between casts; its cache is for the caller to type."""
    graph = node.graph
    assert isinstance(graph, ir.Graph), "an attention is in a graph"
    for k in (*QUERIES, *ROTARY):
        value = node.inputs[k]
        if value is None:
            continue
        table = constant_array(value)
        if table is not None:
            node.replace_input_with(
                k, add_initializer(graph, names(f"{value.name}_half"), table.astype(np.float16))
            )
            continue
        cast = _cast(value, ir.DataType.FLOAT16, names)
        graph.insert_before(node, cast)
        node.replace_input_with(k, cast.outputs[0])
    result = node.outputs[0]
    back = _cast(result, ir.DataType.FLOAT, names)
    graph.insert_after(node, back)
    ir.convenience.replace_all_uses_with(result, back.outputs[0], replace_graph_outputs=True)
    back.replace_input_with(0, result)
    result.type = ir.TensorType(ir.DataType.FLOAT16)
    result.name, back.outputs[0].name = back.outputs[0].name, result.name


def _cast(value: ir.Value, to: ir.DataType, names: FreshNames) -> ir.Node:
    name = names(f"{value.name}_{to.name.lower()}")
    node = ir.node("Cast", [value], {"to": int(to)}, name=name)
    result = node.outputs[0]
    result.name, result.dtype, result.shape = f"{name}_out", to, value.shape
    return node
