"""Compute in float16 or bfloat16 where the values allow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import InternalError
from bitwright.compiler.graph.model import FreshNames
from bitwright.passes.contract import PassResult
from bitwright.passes.narrow_rules import FORMATS, Decisions, FloatFormat, Judge, narrowed
from bitwright.passes.rewriting import add_initializer, fresh_names, frozen_array

Use = tuple[ir.Node, int]


@dataclass(frozen=True)
class NarrowFloats:
    """Make regions of a float32 model float16 or bfloat16; Casts stand at their borders, one a value and direction.

    Weights of a region are stored narrow. Nodes keep float32 where :mod:`bitwright.passes.narrow_rules` says so, and
    the notes count why. Subgraphs are converted like the main graph; what enters and leaves them stays float32.

    Attributes:
        dtype: ``"float16"`` or ``"bfloat16"``. ONNX Runtime's CPU provider executes float16 (it casts to float32
            around operators without such a kernel) and refuses bfloat16 arithmetic.
        nodes: Names of the nodes that may become narrow; None for all.
        ranges: Calibrated (low, high) by tensor name; tensors without a range are taken to fit, unless an operand
            does not.
        headroom: A calibrated range may reach the format's largest value divided by this.
        keep_io: Graph inputs and outputs stay float32.
    """

    dtype: str = "float16"
    nodes: frozenset[str] | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    headroom: float = 2.0
    keep_io: bool = True

    @property
    def name(self) -> str:
        """The pass's name."""
        return "narrow_floats"

    def run(self, model: ir.Model) -> PassResult:
        """Rewrite ``model`` in place; types must be inferred, functions inlined.

        Raises:
            InternalError: ``dtype`` is neither float16 nor bfloat16, or ``headroom`` is below 1.
        """
        fmt = FORMATS.get(self.dtype)
        if fmt is None or self.headroom < 1:
            msg = f"no narrow float format '{self.dtype}' with headroom {self.headroom}"
            raise InternalError(msg)
        found = Judge(model, fmt, self.ranges, fmt.largest / self.headroom).decide(self.nodes)
        edges = set() if self.keep_io else _float_edges(model)
        if found.narrow or edges:
            _Rewrite(model, fmt, found, edges).apply()
        return PassResult(model, len(found.narrow) + len(edges), _notes(found))


def _float_edges(model: ir.Model) -> set[ir.Value]:
    edges = [*model.graph.inputs, *model.graph.outputs]
    return {v for v in edges if v.dtype == ir.DataType.FLOAT and not v.is_initializer()}


def _notes(found: Decisions) -> tuple[str, ...]:
    if not found.narrow:
        return ()
    kept = Counter(found.reasons.values())
    return tuple(f"{count} nodes keep float32: {why}" for why, count in sorted(kept.items()))


class _Rewrite:
    def __init__(self, model: ir.Model, fmt: FloatFormat, found: Decisions, edges: set[ir.Value]) -> None:
        self.fmt, self.found, self.edges = fmt, found, edges
        self.names: FreshNames = fresh_names(model)
        self.inputs, self.outputs = list(model.graph.inputs), set(model.graph.outputs)
        self.narrow_uses: dict[Use, None] = {(n, k): None for n, p in found.narrow.items() for k in p.inputs}
        made = [n.outputs[k] for n, p in found.narrow.items() for k in p.outputs]
        self.narrow_values = dict.fromkeys([*(v for v in self.inputs if v in edges), *made])

    def apply(self) -> None:
        wide = [
            v for v in dict.fromkeys(n.inputs[k] for n, k in self.narrow_uses) if v not in self.narrow_values
        ]
        for value in wide:
            assert value is not None, "only present operands are narrowed"
            self._narrow_reads(value)
        for value in self.narrow_values:
            self._widen_reads(value)
            _retype(value, self.fmt.dtype)
        for value in self.edges & self.outputs:
            if value not in self.narrow_values:
                self._cast_output(value, self.fmt.dtype)

    def _narrow_reads(self, value: ir.Value) -> None:
        """Give the narrow readers of a float32 value a narrow copy."""
        uses = [(u.node, u.idx) for u in value.uses()]
        readers = [use for use in uses if use in self.narrow_uses]
        array = frozen_array(value)
        lowest = self.found.clamped.get(value)
        if array is None or value.const_value is None:
            _rewire(readers, self._cast(value, self.fmt.dtype))
        elif len(readers) == len(uses) and not value.is_graph_output():
            value.const_value = ir.Tensor(narrowed(array, self.fmt, lowest), name=value.name)
            _retype(value, self.fmt.dtype)
        elif lowest is not None:
            _rewire(readers, self._clipped_copy(value, array, lowest))
        else:
            _rewire(readers, self._cast(value, self.fmt.dtype))

    def _clipped_copy(self, value: ir.Value, array: np.ndarray, lowest: float) -> ir.Value:
        graph = value.graph
        assert isinstance(graph, ir.Graph), "an initializer belongs to a graph"
        return add_initializer(
            graph, self.names(f"{value.name}_{self.fmt.name}"), narrowed(array, self.fmt, lowest)
        )

    def _widen_reads(self, value: ir.Value) -> None:
        """Give the float32 readers of a narrow value, and the outside, a float32 copy."""
        readers = [(u.node, u.idx) for u in value.uses() if (u.node, u.idx) not in self.narrow_uses]
        if value.is_graph_output() and value not in self.edges:
            _rewire(readers, self._cast_output(value, ir.DataType.FLOAT))
        elif readers:
            _rewire(readers, self._cast(value, ir.DataType.FLOAT))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Put a Cast behind what makes ``value``, in the same graph, and return its result."""
        suffix = (
            dtype.name.lower().replace("float", "float32") if dtype == ir.DataType.FLOAT else self.fmt.name
        )
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=self.names(f"{value.name}_to_{suffix}"))
        out = cast.outputs[0]
        out.name, out.dtype, out.shape = self.names(f"{value.name}_{suffix}"), dtype, value.shape
        _insert_behind(value, cast)
        return out

    def _cast_output(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Let a Cast of ``value`` be the graph output, under its name."""
        graph, name = value.graph, value.name
        assert isinstance(graph, ir.Graph), "an output belongs to a graph"
        out = self._cast(value, dtype)
        value.name, out.name = out.name, name
        for k, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[k] = out
        return out


def _insert_behind(value: ir.Value, node: ir.Node) -> None:
    graph, producer = value.graph, value.producer()
    assert isinstance(graph, ir.Graph), f"'{value.name}' belongs to no graph"
    if producer is not None:
        graph.insert_after(producer, node)
    elif (first := next(iter(graph), None)) is not None:
        graph.insert_before(first, node)
    else:
        graph.append(node)


def _retype(value: ir.Value, dtype: ir.DataType) -> None:
    # A new type object: a clone of the model shares the old one.
    value.type = ir.TensorType(dtype)


def _rewire(uses: list[Use], value: ir.Value) -> None:
    for node, index in uses:
        node.replace_input_with(index, value)
