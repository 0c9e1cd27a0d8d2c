"""Take attention_mask and position_ids out of a decoder: nobody is padded, positions count from the cache's length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.decoding.interface import Interface, find_interface, length_axis
from bitwright.compiler.decoding.ports import ports_of
from bitwright.compiler.errors import ModelError
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import add_initializer, fresh_names

# Range counts positions; no exporter wrote a decoder with an older opset.
FIRST_OPSET = 11


@dataclass(frozen=True)
class AssumeUnpadded:
    """Compute ``attention_mask`` as ones [batch, past + length] and ``position_ids`` as past, past + 1, ...

    Both inputs disappear, so the model takes tokens and caches alone. It computes what it did for callers whose masks
    hold nothing but ones and whose positions continue those in the cache; that there are no others is for whoever runs
    this pass to know. Masks and positions depend on sizes alone then, which ``fuse_decoder_attention`` asks for.
    """

    name: ClassVar[str] = "assume_unpadded"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place; ``changed`` counts the inputs that are gone.

        Raises:
            ModelError: It is no decoder, or has an opset below 11.
        """
        interface = find_interface(ports_of(model.graph.inputs), ports_of(model.graph.outputs))
        inputs = {v.name: v for v in model.graph.inputs}
        gone = [inputs[port.name] for port in (interface.mask, interface.positions) if port is not None]
        if not gone:
            return PassResult(model, 0)
        _check(model, gone)
        writer = _Writer(model, interface, inputs[interface.tokens.name])
        for value in gone:
            if value.uses():
                mask = interface.mask is not None and value.name == interface.mask.name
                value.replace_all_uses_with(writer.ones(value) if mask else writer.positions(value))
            model.graph.inputs.remove(value)
        writer.insert()
        names = " and ".join(f"'{value.name}'" for value in gone)
        verb = "is" if len(gone) == 1 else "are"
        return PassResult(model, len(gone), (f"{names} {verb} computed: no position is padded",))


def _check(model: ir.Model, gone: list[ir.Value]) -> None:
    opset = model.opset_imports.get("", 0)
    if opset < FIRST_OPSET:
        what = f"opset {opset} cannot count positions"
        raise ModelError(what, where="opset", fix=f"export the decoder with opset {FIRST_OPSET} or later")
    returned = next((v for v in gone if v.is_graph_output()), None)
    if returned is not None:
        what = "the model returns it as it is"
        raise ModelError(
            what, where=f"input '{returned.name}'", fix="export the decoder with logits and caches"
        )


class _Writer:
    """Makes the nodes; they are put in front of all others."""

    def __init__(self, model: ir.Model, interface: Interface, tokens: ir.Value) -> None:
        self._graph, self._names = model.graph, fresh_names(model)
        self._nodes: list[ir.Node] = []
        self._sizes = self._op("Shape", [tokens])
        self._past: ir.Value | None = None
        if interface.caches:
            port = interface.caches[0]
            cache = next(v for v in model.graph.inputs if v.name == port.name)
            self._past = self._op("Gather", [self._op("Shape", [cache]), self._ints([length_axis(port)])])
        new = self._op("Gather", [self._sizes, self._ints([1])])
        self._total = new if self._past is None else self._op("Add", [self._past, new])

    def ones(self, mask: ir.Value) -> ir.Value:
        """Return ones of the mask's type, [batch, past + length]."""
        assert mask.dtype is not None, "the interface has a type"
        batch = self._op("Gather", [self._sizes, self._ints([0])])
        shape = self._op("Concat", [batch, self._total], axis=0)
        one = ir.tensor(np.ones(1, mask.dtype.numpy()), dtype=mask.dtype)
        return self._op("ConstantOfShape", [shape], like=mask, value=one)

    def positions(self, positions: ir.Value) -> ir.Value:
        """Return past, past + 1, ... of the input's type, [batch, length]."""
        assert positions.dtype is not None, "the interface has a type"
        start = self._ints(0)
        if self._past is not None:
            start = self._op("Squeeze", [self._past])
        order = self._op("Range", [start, self._op("Squeeze", [self._total]), self._ints(1)])
        rows = self._op("Expand", [order, self._sizes])
        return self._op("Cast", [rows], like=positions, to=int(positions.dtype))

    def insert(self) -> None:
        """Put everything that was made in front of the graph."""
        self._graph.insert_before(self._graph[0], self._nodes)

    def _ints(self, value: int | list[int]) -> ir.Value:
        return add_initializer(self._graph, self._names("unpadded_size"), np.array(value, np.int64))

    def _op(
        self,
        op_type: str,
        inputs: list[ir.Value],
        like: ir.Value | None = None,
        **attributes: int | ir.TensorProtocol,
    ) -> ir.Value:
        name = self._names(f"unpadded_{op_type.lower()}")
        node = ir.node(op_type, inputs, attributes, name=name)
        value = node.outputs[0]
        value.name = f"{name}_out"
        value.type = ir.TensorType(ir.DataType.INT64) if like is None else like.type
        value.shape = None if like is None else like.shape
        self._nodes.append(node)
        return value
