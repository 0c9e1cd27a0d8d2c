"""Multiply the few input channels with outliers in float, beside the integers (LLM.int8)."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import FreshNames, is_op, node_label, only_consumer
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.rounding.product_error import ProductError
from bitwright.passes.contract import PassResult
from bitwright.passes.linear_inputs import (
    LinearInput,
    insert_behind,
    insert_scale,
    linear_inputs,
    masked_moments,
)
from bitwright.passes.rewriting import add_initializer, fresh_names, frozen_array, graph_of

FEWEST_ROWS = 16
MARK = "split_outliers.float"


@dataclass(frozen=True)
class SplitOutliers:
    """``X W = (X m) W + X[:, O] W[O, :]``: the channels ``O`` leave the integers for a small float product.

    (Dettmers et al. 2022, LLM.int8(), section 3.2, equation 8; the mask ``m`` is 0 on ``O`` and 1 elsewhere.)
    The paper takes the channels above a magnitude of 6; here they are the largest ones seen, as many of
    ``counts`` as leave the least error, cross-validated over sampled rows, if it falls enough.

    Exact up to the order of float sums. It costs a Mul, a Gather, a small MatMul and an Add, which in ONNX
    Runtime is more than channel disassembly's Mul: for inputs where splitting channels is not enough.
    The small product must stay in float: :func:`float_products` names it for the planner.

    Attributes:
        moments: By node name. Kept in step: the layers' entries become those of the masked inputs.
        counts: Numbers of channels to try.
        gain: Share of the predicted error that must go.
        levels: Grid points of the activations.
        largest: Largest integer of the weights.
    """

    name: ClassVar[str] = "split_outliers"

    moments: MutableMapping[str, InputMoments] = field(repr=False)
    counts: tuple[int, ...] = (4, 8, 16)
    gain: float = 0.6
    levels: int = 256
    largest: int = 127

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place."""
        names, notes, changed = fresh_names(model), [], 0
        for found in linear_inputs(model, self.moments, self.name):
            channels, ratio = self._best_channels(found)
            if ratio > 1.0 - self.gain:
                notes.append(f"{found.label}: left as it is, the error would fall to {ratio:.2f} only")
                continue
            _split(found, channels, names)
            masked_moments(self.moments, found, channels)
            changed += 1
            notes.append(
                f"{found.label}: {channels.size} channels in float, predicted error {ratio:.2f} of before"
            )
        return PassResult(model, changed, tuple(notes))

    def _best_channels(self, found: LinearInput) -> tuple[NDArray[np.intp], float]:
        """Return the channels to take out, and the error in terms of the error with them."""
        order = np.argsort(found.moments.largest[0])[::-1]
        rows, weight = found.moments.rows[:, 0], found.weight
        counts = [c for c in self.counts if c < found.channels]
        before = self._noise(rows, weight, np.arange(found.channels)) if len(rows) >= FEWEST_ROWS else 0.0
        if not counts or before == 0:
            return order[:0], 1.0
        after = [self._noise(rows, weight, np.sort(order[count:])) for count in counts]
        best = int(np.argmin(after))
        return np.sort(order[: counts[best]]), after[best] / before

    def _noise(self, rows: NDArray[np.float32], weight: NDArray[np.float32], kept: NDArray[np.intp]) -> float:
        error = ProductError(rows[:, kept], weight[kept], self.levels, self.largest)
        one = np.ones(kept.size, np.float32)
        return error.noise(lambda _: (None, one))


def float_products(model: ir.Model) -> frozenset[str]:
    """Return the names of the float products that the pass has added; the planner must leave them in float."""
    return frozenset(node_label(node) for node in model.graph if MARK in node.meta)


def _split(found: LinearInput, channels: NDArray[np.intp], names: FreshNames) -> None:
    """Add the float products first: they read the value itself, the layers then its masked form."""
    graph, value = graph_of(found.readers[0]), found.value
    constant = add_initializer(graph, names(f"{value.name}_outliers"), channels.astype(np.int64))
    gather = ir.node("Gather", [value, constant], {"axis": -1}, name=names(f"{value.name}_take"))
    outliers = gather.outputs[0]
    outliers.name, outliers.type = names(f"{value.name}_taken"), value.type
    if value.shape is not None:
        outliers.shape = ir.Shape([*list(value.shape)[:-1], channels.size])
    insert_behind(graph, value, [gather])
    for node in found.readers:
        _add_product(node, outliers, channels, names)
    mask = np.ones(found.channels)
    mask[channels] = 0
    insert_scale(found, mask, names)


def _add_product(node: ir.Node, outliers: ir.Value, channels: NDArray[np.intp], names: FreshNames) -> None:
    graph, weight = graph_of(node), frozen_array(node.inputs[1])
    assert weight is not None, "linear layers have constant weights"
    last = _with_bias(node)
    result = last.outputs[0]
    rows = add_initializer(graph, names(f"{node.name}_outlier_rows"), weight[channels])
    product = ir.node("MatMul", [outliers, rows], name=names(f"{node.name}_outliers"))
    product.meta[MARK] = True
    total = ir.node("Add", [result, product.outputs[0]], name=names(f"{node.name}_with_outliers"))
    for new, stem in ((product.outputs[0], "outliers"), (total.outputs[0], "sum")):
        new.name, new.type = names(f"{result.name}_{stem}"), result.type
        new.shape = None if result.shape is None else result.shape.copy()
    name = result.name
    result.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, result)
    if total.outputs[0].is_graph_output():
        result.name, total.outputs[0].name = names(f"{name}_integers"), name
    graph.insert_after(last, [product, total])


def _with_bias(node: ir.Node) -> ir.Node:
    """Return the bias Add behind a MatMul, which kernels fuse with it, else the node itself."""
    following = only_consumer(node.outputs[0])
    if (
        following is not None
        and following.graph is node.graph
        and is_op(node, "MatMul")
        and is_op(following, "Add")
        and any(frozen_array(v) is not None for v in following.inputs)
    ):
        return following
    return node
