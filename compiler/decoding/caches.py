"""Which output of a decoder continues which of its caches: found by following each cache through the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from bitwright.compiler.decoding.interface import Interface, length_axis
from bitwright.compiler.decoding.ports import Port, ports_of
from bitwright.compiler.errors import ModelError

# Operators that hand a tensor on: what was there before is still in the result, in front or behind.
CARRYING = frozenset(
    [
        "Cast",
        "Concat",
        "DequantizeLinear",
        "Identity",
        "QuantizeLinear",
        "Reshape",
        "ScatterElements",
        "ScatterND",
        "Slice",
        "Squeeze",
        "TensorScatter",
        "Transpose",
        "Unsqueeze",
    ]
)
# Fused attention: input number of the past -> output number of the present.
ATTENTION = {
    "GroupQueryAttention": {3: 1, 4: 2},
    "MultiHeadAttention": {6: 1, 7: 2},
    "Attention": {4: 1, 5: 2},
}
FIX = (
    "export the cache as pairs of one past input and one present output with the same element type and sizes"
)


def cache_pairs(model: ir.Model, interface: Interface) -> dict[str, str]:
    """Return the name of each cache's input -> the name of the output that is its next value.

    Args:
        model: The decoder.
        interface: Its inputs and outputs.

    Raises:
        ModelError: An output is missing, or it cannot be told which one it is.
    """
    outputs = [p for p in ports_of(model.graph.outputs) if p.name != interface.logits.name]
    values = {value.name: value for value in model.graph.inputs}
    pairs: dict[str, str] = {}
    for port in interface.caches:
        reached = _reached(values[port.name])
        fitting = [o for o in outputs if o.name not in pairs.values() and _continues(port, o)]
        found = [o for o in fitting if o.name in reached] or fitting
        if len(found) != 1:
            what = f"none of the outputs continues the cache {port}"
            if found:
                what = f"any of {_names(found)} could continue the cache {port}"
            raise ModelError(what, where="graph outputs", fix=FIX)
        pairs[port.name] = found[0].name
    return pairs


def _names(ports: Sequence[Port]) -> str:
    return ", ".join(f"'{port.name}'" for port in ports)


def _continues(past: Port, present: Port) -> bool:
    """Tell whether types and sizes are those of the same cache, some tokens later."""
    if past.dims is None or present.dims is None or past.rank != present.rank or past.dtype != present.dtype:
        return False
    sizes = [
        pair for k, pair in enumerate(zip(past.dims, present.dims, strict=True)) if k != length_axis(past)
    ]
    return all(a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int))


def _reached(start: ir.Value) -> set[str | None]:
    """Return the graph outputs that a value is handed on to."""
    found: set[str | None] = set()
    seen = {start}
    waiting = [start]
    while waiting:
        for value in _handed_on(waiting.pop()):
            if value in seen:
                continue
            seen.add(value)
            waiting.append(value)
            if value.is_graph_output():
                found.add(value.name)
    return found


def _handed_on(value: ir.Value) -> Iterator[ir.Value]:
    for use in value.uses():
        node = use.node
        if node.op_type in CARRYING:
            # The number of elements may come from another input; data is the first, and all of them in a Concat.
            if use.idx == 0 or node.op_type == "Concat":
                yield node.outputs[0]
        elif node.op_type in ATTENTION:
            number = ATTENTION[node.op_type].get(use.idx)
            if number is not None and number < len(node.outputs):
                yield node.outputs[number]
