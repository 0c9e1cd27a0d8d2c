"""Where a positive factor for each channel (last axis) of a value can be folded, exactly, into constants behind it.

``y * f`` is computed for free if ``f`` can be pushed from ``y`` towards the inputs until it meets the gain of a
normalization or the columns and bias of a linear layer. On the way it may pass positively homogeneous functions
(Relu), one side of a product (the up-projection of SwiGLU), the value operand of an attention product (softmax mixes
tokens, not channels) and every Reshape, Transpose, Expand and Split that keeps track of the channels. Where a value is
repeated (grouped-query attention) all copies must have one factor: such channels form a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.graph.model import (
    FreshNames,
    consumers,
    int_attribute,
    ints_attribute,
    is_op,
    node_label,
    rank,
)
from bitwright.passes.rewriting import add_initializer, frozen_array, graph_of, set_input

Labels = NDArray[np.int64]

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
HOMOGENEOUS = ("Relu", "LeakyRelu", "Identity", "Neg")
UNTOUCHED = -1  # the label of a channel whose factor is 1: another part of a split value


@dataclass(frozen=True)
class Site:
    """A constant operand that takes the factor.

    Attributes:
        node: Its reader.
        index: Which input of the reader.
        labels: Channel of the value that each index of the constant's last axis belongs to, or UNTOUCHED.
    """

    node: ir.Node
    index: int
    labels: Labels


@dataclass(frozen=True)
class Fold:
    """Where a factor goes, or why it goes nowhere.

    Attributes:
        sites: Constants to multiply; empty if the factor does not fold.
        groups: int64 [C]: channels of one number must share one factor.
        why_not: Why it does not fold.
    """

    sites: tuple[Site, ...]
    groups: Labels
    why_not: str = ""


class _StuckError(Exception):
    """The factor cannot be pushed past a node."""


def _stop(why: str) -> NoReturn:
    raise _StuckError(why)


def data_readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read the elements of ``value``; Shape and Size read none."""
    return [n for n in consumers(value) if not is_op(n, "Shape", "Size")]


def read_only_by(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    """Tell whether all readers of the elements are among ``nodes``, in the main graph of the value."""
    graph = nodes[0].graph if nodes else None
    return not value.is_graph_output() and all(n in nodes and n.graph is graph for n in data_readers(value))


def find_fold(value: ir.Value, readers: Sequence[ir.Node], channels: int) -> Fold:
    """Find where ``value * f`` can be folded, ``f`` one positive factor a channel of the last axis.

    Sizes that two shapes leave open are taken to be the same where they stand in the same place.

    Args:
        value: The value.
        readers: The nodes that will make up for the factor; any other reader forbids it.
        channels: C, the size of the value's last axis.
    """
    trace = _Trace(np.arange(channels))
    try:
        known = rank(value)
        if known is None:
            _stop(f"the rank of '{value.name}' is unknown")
        if not read_only_by(value, readers):
            _stop(f"'{value.name}' has other readers")
        labels = np.arange(channels, dtype=np.int64).reshape((1,) * (known - 1) + (channels,))
        trace.push(value, labels)
    except _StuckError as stuck:
        return Fold((), np.arange(channels), str(stuck))
    return Fold(tuple(trace.sites), trace.groups())


def apply_fold(fold: Fold, factor: NDArray[np.float64], names: FreshNames) -> None:
    """Multiply the constants of ``fold``; ``factor`` float64 [C] is constant within its groups."""
    padded = np.append(factor, 1.0)  # UNTOUCHED is the last index
    for site in fold.sites:
        value = site.node.inputs[site.index]
        array = frozen_array(value)
        assert array is not None and value is not None, "the trace only notes constants"
        product = (array.astype(np.float64) * padded[site.labels]).astype(array.dtype)
        new = add_initializer(graph_of(site.node), names(f"{value.name}_migrated"), product)
        set_input(site.node, site.index, new)


@dataclass
class _Trace:
    """One search: the sites met, and which channels must share a factor (a union-find forest)."""

    parent: Labels
    sites: list[Site] = field(default_factory=list)
    at: ir.Value | None = None  # the value whose producer is asked

    def groups(self) -> Labels:
        roots = np.array([self._root(k) for k in range(len(self.parent))])
        return np.unique(roots, return_inverse=True)[1].astype(np.int64)

    def _root(self, k: int) -> int:
        while self.parent[k] != k:
            k = int(self.parent[k])
        return k

    def _join(self, first: Labels, second: Labels) -> None:
        for a, b in zip(first.reshape(-1).tolist(), second.reshape(-1).tolist(), strict=True):
            self.parent[self._root(a)] = self._root(b)

    def push(self, value: ir.Value, labels: Labels) -> None:
        """Fold the factor ``labels`` (of the value's rank, 1 where it does not vary) of a value."""
        node = value.producer()
        if node is None:
            _stop(f"'{value.name}' is an input of the graph")
        self.at = value
        if node.op_type != "Split" and value is not node.outputs[0]:
            _stop(f"'{value.name}' is a side output of '{node_label(node)}'")
        rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx", "com.microsoft") else None
        if rule is None:
            _stop(f"{node.op_type} '{node_label(node)}' does not let a factor through")
        rule(self, node, labels)

    def push_input(self, node: ir.Node, index: int, labels: Labels) -> None:
        """Go on with an operand, which nothing else may read."""
        operand = node.inputs[index]
        once = operand is not None and list(node.inputs).count(operand) == 1
        if operand is None or not once or not read_only_by(operand, [node]):
            name = operand.name if operand is not None else index
            _stop(f"'{name}' has other readers")
        self.push(operand, labels)

    def normalization(self, node: ir.Node, labels: Labels) -> None:
        axis, known = int_attribute(node, "axis", -1), labels.ndim
        if axis % known != known - 1:
            _stop(f"'{node_label(node)}' normalizes more than the last axis")
        for index in range(1, 3 if len(node.inputs) > 2 and node.inputs[2] is not None else 2):
            self.constant(node, index, labels)

    def constant(self, node: ir.Node, index: int, labels: Labels) -> None:
        """Note a constant operand that takes the factor along its last axis."""
        row, operand = _last_axis(labels), node.inputs[index]
        array = frozen_array(operand)
        if array is None or operand is None or array.dtype.kind != "f":
            _stop(f"operand {index} of '{node_label(node)}' is no constant")
        if array.ndim and array.shape[-1] not in (1, row.size):
            _stop(f"'{operand.name}' has no channel axis")
        self.sites.append(Site(node, index, row))

    def weight(self, node: ir.Node, labels: Labels) -> None:
        """Note a weight [K, N] that this node alone reads."""
        operand = node.inputs[1]
        array = frozen_array(operand)
        if array is None or operand is None or array.ndim != 2 or array.shape[1] != _last_axis(labels).size:
            _stop(f"the weight of '{node_label(node)}' is no constant matrix")
        if consumers(operand) != [node] or operand.is_graph_output():
            _stop(f"'{operand.name}' is shared")
        self.constant(node, 1, labels)

    def gemm(self, node: ir.Node, labels: Labels) -> None:
        if int_attribute(node, "transB", 0):
            _stop(f"'{node_label(node)}' reads its weight transposed")
        self.weight(node, labels)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            self.constant(node, 2, labels)

    def matmul(self, node: ir.Node, labels: Labels) -> None:
        if frozen_array(node.inputs[1]) is not None:
            self.weight(node, labels)
        elif labels.ndim < 2 or labels.shape[-2] != 1:
            _stop(f"the factor differs over the rows of '{node_label(node)}'")
        else:  # P V: a factor of the columns is one of V's
            self.push_input(node, 1, _spanned(node, 1, labels))

    def homogeneous(self, node: ir.Node, labels: Labels) -> None:
        self.push_input(node, 0, labels)

    def add(self, node: ir.Node, labels: Labels) -> None:
        for index, value in enumerate(node.inputs):
            if frozen_array(value) is not None:
                self.constant(node, index, labels)
            else:
                self.push_input(node, index, _spanned(node, index, labels))

    def mul(self, node: ir.Node, labels: Labels) -> None:
        constants = [k for k, v in enumerate(node.inputs) if frozen_array(v) is not None]
        gains = [k for k in constants if not _is_scalar(node.inputs[k])]
        if gains:
            self.constant(node, gains[0], labels)
            return
        # A scalar factor belongs to the function in front of it (0.5 of a Gelu, say) and stays what it is.
        reasons = []
        for index in (k for k in range(2) if k not in constants):
            before = (len(self.sites), self.parent.copy())
            try:
                self.push_input(node, index, _spanned(node, index, labels))
            except _StuckError as stuck:
                del self.sites[before[0] :]
                self.parent = before[1]
                reasons.append(str(stuck))
            else:
                return
        _stop("; ".join(reasons))

    def div(self, node: ir.Node, labels: Labels) -> None:
        self.push_input(node, 0, _spanned(node, 0, labels))

    def transpose(self, node: ir.Node, labels: Labels) -> None:
        perm = ints_attribute(node, "perm", tuple(reversed(range(labels.ndim))))
        self.push_input(node, 0, labels.transpose(np.argsort(perm)))

    def reshape(self, node: ir.Node, labels: Labels) -> None:
        source, target = _shape(node.inputs[0]), _shape(node.outputs[0])
        self.push_input(node, 0, _unreshaped(labels, source, target, node_label(node)))

    def squeeze(self, node: ir.Node, labels: Labels) -> None:
        self.push_input(node, 0, np.expand_dims(labels, self._axes(node, len(_shape(node.inputs[0])))))

    def unsqueeze(self, node: ir.Node, labels: Labels) -> None:
        self.push_input(node, 0, labels.squeeze(self._axes(node, labels.ndim)))

    def _axes(self, node: ir.Node, rank_: int) -> tuple[int, ...]:
        constant = frozen_array(node.inputs[1]) if len(node.inputs) > 1 else None
        if constant is None:
            _stop(f"the axes of '{node_label(node)}' are no constant")
        return tuple(sorted(int(a) % rank_ for a in constant.reshape(-1)))

    def expand(self, node: ir.Node, labels: Labels) -> None:
        """Copies must share their factor."""
        source = _shape(node.inputs[0])
        if (labels == UNTOUCHED).any():
            _stop(f"'{node_label(node)}' repeats a part of a value")
        aligned = labels.reshape(labels.shape[labels.ndim - len(source) :]) if _fits(labels, source) else None
        if aligned is None:
            self._join(np.broadcast_to(labels[0], labels.shape), labels)
            aligned = labels[0]
        for axis, size in enumerate(source):
            if size == 1 and aligned.shape[axis] > 1:
                first = aligned.take([0], axis)
                self._join(np.broadcast_to(first, aligned.shape), aligned)
                aligned = first
        self.push_input(node, 0, _checked(aligned, source, node_label(node)))

    def split(self, node: ir.Node, labels: Labels) -> None:
        axis = int_attribute(node, "axis", 0) % labels.ndim
        sizes = [_shape(output)[axis] for output in node.outputs]
        which = [output is self.at for output in node.outputs].index(True)
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes) or labels.shape[axis] != known[which]:
            _stop(f"'{node_label(node)}' does not split along the channels")
        pads = [(0, 0)] * labels.ndim
        pads[axis] = (sum(known[:which]), sum(known[which + 1 :]))
        self.push_input(node, 0, np.pad(labels, pads, constant_values=UNTOUCHED))


_RULES: dict[str, Callable[[_Trace, ir.Node, Labels], None]] = {
    **dict.fromkeys(NORMALIZATIONS, _Trace.normalization),
    **dict.fromkeys(HOMOGENEOUS, _Trace.homogeneous),
    "MatMul": _Trace.matmul,
    "Gemm": _Trace.gemm,
    "Add": _Trace.add,
    "Mul": _Trace.mul,
    "Div": _Trace.div,
    "Transpose": _Trace.transpose,
    "Reshape": _Trace.reshape,
    "Squeeze": _Trace.squeeze,
    "Unsqueeze": _Trace.unsqueeze,
    "Expand": _Trace.expand,
    "Split": _Trace.split,
}


def _is_scalar(value: ir.Value | None) -> bool:
    array = frozen_array(value)
    return array is not None and array.size == 1


def _last_axis(labels: Labels) -> Labels:
    if labels.size != labels.shape[-1]:
        _stop("the factor varies over more than one axis of a constant's reader")
    return labels.reshape(-1)


def _shape(value: ir.Value | None) -> tuple[int | None, ...]:
    if value is None or value.shape is None:
        _stop(f"the shape of '{value.name if value is not None else ''}' is unknown")
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _fits(labels: Labels, source: tuple[int | None, ...]) -> bool:
    """Tell whether the factor varies over no axis in front of those of ``source``."""
    return all(size == 1 for size in labels.shape[: labels.ndim - len(source)])


def _checked(labels: Labels, source: tuple[int | None, ...], name: str) -> Labels:
    """Return ``labels`` if ``source`` has the size of every axis that they vary over."""
    if any(size > 1 and size != real for size, real in zip(labels.shape, source, strict=True)):
        _stop(f"'{name}' repeats its operand")
    return labels


def _spanned(node: ir.Node, index: int, labels: Labels) -> Labels:
    """Return the labels of operand ``index`` of a broadcasting operator, which must span the factor's axes."""
    source = _shape(node.inputs[index])
    if len(source) > labels.ndim or not _fits(labels, source):
        _stop(f"'{node_label(node)}' repeats its operand")
    return _checked(labels.reshape(labels.shape[labels.ndim - len(source) :]), source, node_label(node))


def _unreshaped(
    labels: Labels, source: tuple[int | None, ...], target: tuple[int | None, ...], name: str
) -> Labels:
    """Return the labels in front of a Reshape: row-major order keeps blocks of trailing axes together."""
    shape: list[int] = [1] * len(source)
    full = list(labels.shape)
    done = len(target)
    for targets, sources in _aligned(source, target):
        done = targets.start
        if any(labels.shape[k] > 1 for k in targets):
            for k in targets:
                full[k] = target[k] or labels.shape[k]
            for k in sources:
                shape[k] = source[k] or labels.shape[targets.start]
    if any(labels.shape[k] > 1 for k in range(done)):
        _stop(f"'{name}' mixes the channels with axes of unknown size")
    return np.broadcast_to(labels, full).reshape(shape)


def _aligned(source: tuple[int | None, ...], target: tuple[int | None, ...]) -> Iterator[tuple[range, range]]:
    """Yield (target axes, source axes) of equal size, from the last axis on, as far as the sizes tell."""
    i, j = len(target), len(source)
    while i and j:
        first_i, first_j = i - 1, j - 1
        if target[first_i] is not None and source[first_j] is not None:
            while (a := _product(target[first_i:i])) != (b := _product(source[first_j:j])):
                grow = first_i - 1 if a < b else first_j - 1
                if grow < 0 or (target if a < b else source)[grow] is None:
                    return
                first_i, first_j = (grow, first_j) if a < b else (first_i, grow)
        elif target[first_i] is not source[first_j]:
            return
        yield range(first_i, i), range(first_j, j)
        i, j = first_i, first_j


def _product(sizes: tuple[int | None, ...]) -> int:
    return math.prod(size for size in sizes if size is not None)
