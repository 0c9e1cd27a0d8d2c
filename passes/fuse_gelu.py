"""Write a spelled-out Gelu as one operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bitwright.compiler.graph.model import is_op
from bitwright.passes.contract import PassResult
from bitwright.passes.rewriting import fresh_names, frozen_array, graph_of, only_local_consumer, replace_node

GELU_OPSET = 20
# The literals of exporters are float32 roundings of 1/sqrt(2), or have five decimals.
RELATIVE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class FuseGelu:
    """``0.5 x (1 + erf(x / sqrt(2)))``, in any order of its products, becomes ``Gelu(x)``.

    Runtimes fuse it themselves, but not behind a quantizer: ONNX Runtime gives every reader of a DequantizeLinear its
    own copy, and then no longer sees that both branches start at one value. Gelu is an operator since opset 20; an
    older model is left as it is.
    """

    name: ClassVar[str] = "fuse_gelu"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite."""
        if model.opset_imports.get("", 0) < GELU_OPSET:
            return PassResult(model, 0)
        found = [f for g in model.graphs() for n in g if is_op(n, "Erf") and (f := _spelled_out(n))]
        names = fresh_names(model) if found else None
        for source, last, inside in found:
            assert names is not None
            gelu = ir.node("Gelu", [source], name=names(f"{last.name}_gelu"))
            replace_node(last, [gelu], [gelu.outputs[0]])
            for node in inside:
                graph_of(node).remove(node, safe=True)
        return PassResult(model, len(found))


def _is_constant(value: ir.Value | None, expected: float) -> bool:
    array = frozen_array(value)
    if array is None or array.size != 1:
        return False
    return bool(np.isclose(float(array.reshape(-1)[0]), expected, rtol=RELATIVE_TOLERANCE, atol=0))


def _other_operand(node: ir.Node, known: ir.Value) -> ir.Value | None:
    """Return the operand that is not ``known``; None if both are."""
    others = [v for v in node.inputs if v is not known]
    return others[0] if len(others) == 1 else None


def _scaled(value: ir.Value | None, factor: float) -> tuple[ir.Value, ir.Node] | None:
    """Return ``x`` and the node if ``value`` is x times the factor."""
    node = None if value is None else value.producer()
    if node is None or value is None or value.is_graph_output():
        return None
    if is_op(node, "Div") and node.inputs[0] is not None and _is_constant(node.inputs[1], 1 / factor):
        return node.inputs[0], node
    if is_op(node, "Mul"):
        for x, constant in (node.inputs, node.inputs[::-1]):
            if x is not None and _is_constant(constant, factor):
                return x, node
    return None


def _spelled_out(erf: ir.Node) -> tuple[ir.Value, ir.Node, list[ir.Node]] | None:
    """Return Gelu's input, the node that writes its result, and the nodes before that, from last to first."""
    argument = _scaled(erf.inputs[0], 1 / math.sqrt(2))
    add = only_local_consumer(erf.outputs[0])
    if argument is None or add is None or not is_op(add, "Add"):
        return None
    source, scale = argument
    if only_local_consumer(scale.outputs[0]) is not erf or not _is_constant(
        _other_operand(add, erf.outputs[0]), 1.0
    ):
        return None
    product = _product(add, source)
    if product is None:
        return None
    last, inside = product
    return source, last, [*inside, add, erf, scale]


def _product(add: ir.Node, source: ir.Value) -> tuple[ir.Node, list[ir.Node]] | None:
    """Follow the multiplications behind ``add`` until they are by ``source`` and one half.

    Returns:
        The last multiplication, and the others from last to first.
    """
    wanted, path, aside, current = {"source", "half"}, [], [], add
    while wanted:
        following = only_local_consumer(current.outputs[0])
        if following is None or not is_op(following, "Mul"):
            return None
        factors, extra = _factors(_other_operand(following, current.outputs[0]), source, following)
        if not factors or not factors <= wanted:
            return None
        wanted, current = wanted - factors, following
        path.append(following)
        aside.extend(extra)
    return path[-1], [*path[-2::-1], *aside]


def _factors(value: ir.Value | None, source: ir.Value, reader: ir.Node) -> tuple[set[str], list[ir.Node]]:
    """Return which of the two factors ``value`` is, and the node that joins them if it is both."""
    if value is source:
        return {"source"}, []
    if _is_constant(value, 0.5):
        return {"half"}, []
    half = _scaled(value, 0.5)
    if half is not None and half[0] is source and only_local_consumer(half[1].outputs[0]) is reader:
        return {"source", "half"}, [half[1]]
    return set(), []
