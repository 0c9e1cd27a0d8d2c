"""Values that linear layers read: what the passes that rewrite such inputs share."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import FreshNames, consumers, int_attribute, is_op, node_label
from bitwright.compiler.moments import InputMoments
from bitwright.passes.rewriting import add_initializer, frozen_array, graph_of, set_input


@dataclass(frozen=True, eq=False)
class LinearInput:
    """A value and the linear layers of the main graph that multiply it with a constant matrix.

    Attributes:
        value: The value, [..., K].
        readers: MatMul and Gemm nodes that alone read their weights, stored [K, N].
        moments: Of the value's rows.
    """

    value: ir.Value
    readers: tuple[ir.Node, ...]
    moments: InputMoments

    @property
    def channels(self) -> int:
        """K."""
        return self.moments.depth

    @property
    def weight(self) -> NDArray[np.float32]:
        """The readers' weights side by side, float32 [K, sum N]."""
        return np.concatenate([_weight(node) for node in self.readers], axis=1)

    @property
    def label(self) -> str:
        """What a note calls it."""
        return f"input of {', '.join(node_label(n) for n in self.readers)}"


def linear_inputs(model: ir.Model, moments: Mapping[str, InputMoments], mark: str) -> list[LinearInput]:
    """Return the inputs that linear layers with moments read, in graph order.

    The layers are marked as looked at, and marked ones are left out: nothing is rewritten twice, nor judged again
    because a neighbour's weight has changed. A layer whose weight something else reads, too, is left out.

    Args:
        model: The model.
        moments: By node name.
        mark: Name of the pass that asks.
    """
    found: dict[ir.Value, list[ir.Node]] = {}
    done: set[ir.Value] = set()
    for node in model.graph:
        value = node.inputs[0] if node.inputs else None
        if value is None or not _is_linear(node) or moments.get(node_label(node)) is None:
            continue
        if mark in node.meta:
            done.add(value)
        node.meta[mark] = True
        found.setdefault(value, []).append(node)
    result = []
    for value, nodes in found.items():
        first = moments[node_label(nodes[0])]
        fits = all(moments[node_label(n)].depth == first.depth == _weight(n).shape[0] for n in nodes)
        if value not in done and first.groups == 1 and fits and np.isfinite(first.rows).all():
            result.append(LinearInput(value, tuple(nodes), first))
    return result


def _is_linear(node: ir.Node) -> bool:
    if (
        not is_op(node, "MatMul", "Gemm")
        or int_attribute(node, "transA", 0)
        or int_attribute(node, "transB", 0)
    ):
        return False
    weight = node.inputs[1]
    array = frozen_array(weight)
    if weight is None or array is None or array.ndim != 2 or array.dtype != np.float32:
        return False
    return consumers(weight) == [node] and not weight.is_graph_output() and weight.graph is node.graph


def _weight(node: ir.Node) -> NDArray[np.float32]:
    array = frozen_array(node.inputs[1])
    assert array is not None, "linear layers have constant weights"
    return np.asarray(array, np.float32)


def rewrite_weights(
    found: LinearInput,
    index: NDArray[np.intp] | None,
    factor: NDArray[np.float64],
    names: FreshNames,
) -> None:
    """Let every reader multiply by rows ``index`` (None: all) of its weight, times ``factor``."""
    for node in found.readers:
        array = _weight(node)
        rows = (array if index is None else array[index]).astype(np.float64) * factor[:, None]
        stem = node.inputs[1].name if node.inputs[1] is not None else "weight"
        set_input(
            node, 1, add_initializer(graph_of(node), names(f"{stem}_migrated"), rows.astype(np.float32))
        )


def insert_scale(found: LinearInput, factor: NDArray[np.float64], names: FreshNames) -> ir.Value:
    """Let the readers, and no others, read ``value * factor``; return the product."""
    value, graph = found.value, graph_of(found.readers[0])
    constant = add_initializer(graph, names(f"{value.name}_factor"), factor.astype(np.float32))
    mul = ir.node("Mul", [value, constant], name=names(f"{value.name}_scale"))
    output = mul.outputs[0]
    output.name, output.type = names(f"{value.name}_scaled"), value.type
    output.shape = None if value.shape is None else value.shape.copy()
    insert_behind(graph, value, [mul])
    for node in found.readers:
        node.replace_input_with(0, output)
    return output


def insert_behind(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Put nodes behind the producer of ``value``, or first in the graph."""
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, nodes)
    else:
        graph.insert_before(next(iter(graph)), nodes)


def migrate_moments(
    moments: MutableMapping[str, InputMoments],
    found: LinearInput,
    index: NDArray[np.intp] | None,
    divisor: NDArray[np.float64],
) -> None:
    """Replace the readers' moments by those of ``x_index / divisor``: exact algebra, no run."""
    old = found.moments
    take = np.arange(old.depth) if index is None else index
    new = replace(
        old,
        mean=old.mean[:, take] / divisor,
        second=old.second[:, take][:, :, take] / (divisor[:, None] * divisor),
        largest=(old.largest[:, take] / divisor).astype(np.float32),
        rows=(old.rows[:, :, take] / divisor).astype(np.float32),
    )
    for node in found.readers:
        moments[node_label(node)] = new


def masked_moments(
    moments: MutableMapping[str, InputMoments], found: LinearInput, channels: NDArray[np.intp]
) -> None:
    """Replace the readers' moments by those of the value with ``channels`` set to zero."""
    old = found.moments
    mask = np.ones(old.depth)
    mask[channels] = 0
    new = replace(
        old,
        mean=old.mean * mask,
        second=old.second * (mask[:, None] * mask),
        largest=(old.largest * mask).astype(np.float32),
        rows=(old.rows * mask).astype(np.float32),
    )
    for node in found.readers:
        moments[node_label(node)] = new
