"""Which nodes may compute in a narrow float type, and why the others keep float32.

What an operator accepts is asked of its ONNX schema. What its values allow follows from constants and calibrated
ranges. Four kinds of nodes keep float32 whatever their ranges:

* arithmetic on integers that were cast to float (sizes, positions, rotary angles, pixels): float16 has no odd
  integers above 2048;
* the statistics around a denominator's guard: a constant that is subnormal in the narrow type, such as an epsilon of
  1e-12, would vanish, and so would the squares it is added to;
* quantizers, whose scales must stay what calibration found;
* what follows a value that is too large for the narrow type and whose own range is unknown.

An attention mask is the exception: a large negative constant that only reaches a Softmax means "no weight", and -2^14
says so in every format, with room for three masks to be added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from bitwright.compiler.graph.model import STANDARD_DOMAINS, consumers, is_op, node_label, subgraphs
from bitwright.passes.rewriting import frozen_array

Ranges = Mapping[str, tuple[float, float]]

MASK = -(2.0**14)
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
MOVERS = (
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Trilu",
    "Unsqueeze",
)
CARRIES_A_MASK = (*MOVERS, "Add", "Mul", "Where")
COUNTS = (
    *MOVERS,
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Neg",
    "Abs",
    "Floor",
    "Ceil",
    "Round",
    "Mod",
    "Min",
    "Max",
)
PHASES = ("Sin", "Cos")
GUARDS = ("Add", "Max", "Clip")
BEFORE_A_GUARD = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2", "Pow", "Sqrt")
BEHIND_A_GUARD = ("Sqrt", "Pow", "Expand", "Reciprocal", "Div")
LAST_BEHIND_A_GUARD = ("Reciprocal", "Div")
BOUNDED = ("Softmax", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Softsign", *PHASES, "LayerNormalization")


@dataclass(frozen=True)
class FloatFormat:
    """A narrow float type.

    Attributes:
        dtype: Element type.
        largest: Largest finite value.
        smallest_normal: Below it, values lose precision or vanish.
    """

    dtype: ir.DataType
    largest: float
    smallest_normal: float

    @property
    def name(self) -> str:
        """Name of the type, e.g. ``"float16"``."""
        return self.dtype.name.lower()


FORMATS = {
    "float16": FloatFormat(ir.DataType.FLOAT16, 65504.0, 2.0**-14),
    "bfloat16": FloatFormat(ir.DataType.BFLOAT16, (2.0 - 2.0**-7) * 2.0**127, 2.0**-126),
}


@dataclass(frozen=True)
class Ports:
    """Which float32 inputs and outputs of a node become narrow, by index."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Decisions:
    """The outcome.

    Attributes:
        narrow: Nodes that compute in the narrow type.
        reasons: Node label -> why it keeps float32.
        clamped: Constants that need the clip of :func:`narrowed`, with the lowest value they may take.
    """

    narrow: dict[ir.Node, Ports] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    clamped: dict[ir.Value, float] = field(default_factory=dict)


def narrowed(array: np.ndarray, fmt: FloatFormat, lowest: float | None = None) -> np.ndarray:
    """Return ``array`` in the narrow type; with ``lowest``, finite values are clipped to what that leaves."""
    if lowest is not None:
        array = np.where(np.isfinite(array), np.clip(array, lowest, fmt.largest), array)
    return array.astype(fmt.dtype.numpy())


def fits(array: np.ndarray, fmt: FloatFormat) -> str:
    """Return "" if the narrow type can hold a constant, else why it cannot (infinities and zeros are no obstacle)."""
    largest = float(max(array.max(initial=0.0), -array.min(initial=0.0)))
    if not np.isfinite(largest):
        largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
    if largest > fmt.largest:
        return f"a constant of {largest:.3g} overflows {fmt.name}"
    if 0 < largest < fmt.smallest_normal:
        return f"a constant of {largest:.3g} underflows {fmt.name}"
    return ""


def ports_of(node: ir.Node, fmt: FloatFormat, opset: int) -> Ports | str:
    """Return what of ``node`` can become narrow by its ONNX schema, or why nothing can."""
    if node.domain not in STANDARD_DOMAINS:
        return f"domain '{node.domain}' has no schema here"
    if next(subgraphs(node), None) is not None:
        return "control flow passes its values on as they are"
    if node.op_type in (*QUANTIZERS, "Cast", "CastLike"):
        return "it converts types itself"
    if any(v is not None and v.type is None for v in (*node.inputs, *node.outputs)):
        return "a type is unknown"
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"opset {opset} does not define it"
    return _typed_ports(node, schema, fmt)


def _typed_ports(node: ir.Node, schema: onnx.defs.OpSchema, fmt: FloatFormat) -> Ports | str:
    wanted = f"tensor({fmt.name})"
    accepting = {c.type_param_str for c in schema.type_constraints if wanted in c.allowed_type_strs}
    types = [_formal(schema.inputs, k).type_str for k in range(len(node.inputs))]
    inputs = [k for k, v in enumerate(node.inputs) if _is_float(v) and types[k] in accepting]
    switched = {types[k] for k in inputs}
    outputs = []
    for k, value in enumerate(node.outputs):
        formal = _formal(schema.outputs, k).type_str
        if _is_float(value) and formal in switched:
            outputs.append(k)
        elif _is_float(value) and formal not in types and formal != "tensor(float)" and value.uses():
            return f"the type of output '{value.name}' follows none of its inputs"
    return Ports(tuple(inputs), tuple(outputs)) if inputs else f"it has no {fmt.name} form"


def _formal(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """Return the formal parameter at ``index``; the last one may be variadic."""
    return parameters[min(index, len(parameters) - 1)]


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT and isinstance(value.type, ir.TensorType)


class Judge:
    """Decides for all nodes of a model."""

    def __init__(self, model: ir.Model, fmt: FloatFormat, ranges: Ranges, limit: float) -> None:
        """Prepare.

        Args:
            model: Types inferred, functions inlined.
            fmt: The narrow type.
            ranges: Calibrated (low, high) by tensor name.
            limit: Largest magnitude that a calibrated range may have.
        """
        self.fmt, self.ranges, self.limit = fmt, ranges, limit
        self.opset = next((model.opset_imports[d] for d in STANDARD_DOMAINS if d in model.opset_imports), 0)
        self.nodes = [node for graph in model.graphs() for node in graph]
        self._misfits: dict[ir.Value, str] = {}
        self.masks = self._mask_constants()
        self.masked = set(_behind_masks(self.masks))
        self.counted = self._counted_values() - self.masked
        self.too_large = self._too_large()

    def decide(self, wanted: frozenset[str] | None) -> Decisions:
        """Return the decisions; only nodes in ``wanted`` (all of them if None) may become narrow."""
        found = Decisions(clamped=dict.fromkeys(self.masks, MASK))
        for node in self.nodes:
            if not any(_is_float(v) for v in (*node.inputs, *node.outputs)):
                continue
            ports = ports_of(node, self.fmt, self.opset)
            label = node_label(node)
            if wanted is not None and label not in wanted:
                found.reasons[label] = "not asked for"
            elif isinstance(ports, str):
                found.reasons[label] = ports
            elif reason := self._keeps_float(node, ports):
                found.reasons[label] = reason
            else:
                found.narrow[node] = ports
        self._widen_statistics(found)
        found.clamped |= {v: -self.fmt.largest for n in found.narrow for v in self._bounds(n)}
        return found

    def _keeps_float(self, node: ir.Node, ports: Ports) -> str:
        values = [node.inputs[k] for k in ports.inputs] + [node.outputs[k] for k in ports.outputs]
        if any(v in self.counted for v in values) and not self.masked.intersection(node.outputs):
            return "it computes on integers (positions, sizes, pixels)"
        if reason := self._guards(node):
            return reason
        bounds = self._bounds(node)
        for value in values:
            assert value is not None, "only present operands have ports"
            if value in self.too_large:
                return self.too_large[value]
            if value not in self.masks and value not in bounds and (why := self._misfit(value)):
                return why
        return ""

    def _guards(self, node: ir.Node) -> str:
        """Tell of an epsilon that the operator would add in the narrow type."""
        epsilon = node.attributes.get_float("epsilon", None)
        schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        if epsilon is None and "epsilon" in schema.attributes:
            epsilon = float(onnx.helper.get_attribute_value(schema.attributes["epsilon"].default_value))
        if epsilon is None or "stash_type" in schema.attributes or epsilon >= self.fmt.smallest_normal:
            return ""
        return f"its epsilon of {epsilon:.3g} underflows {self.fmt.name}"

    def _bounds(self, node: ir.Node) -> list[ir.Value]:
        """Return a Clip's constant limits: clipping them to the format's changes nothing for values that fit."""
        found = node.inputs[1:3] if is_op(node, "Clip") else ()
        return [v for v in found if v is not None and "overflows" in self._misfit(v)]

    def _misfit(self, value: ir.Value) -> str:
        """Return why the narrow type cannot hold a constant, "" for what is none."""
        if value not in self._misfits:
            array = frozen_array(value) if _is_float(value) else None
            self._misfits[value] = "" if array is None else fits(array, self.fmt)
        return self._misfits[value]

    def _counted_values(self) -> set[ir.Value]:
        found: set[ir.Value] = set()
        for node in self.nodes:
            if is_op(node, "Cast") and _is_float(node.outputs[0]) and _is_integer(node.inputs[0]):
                found.add(node.outputs[0])
            elif is_op(node, *COUNTS, *PHASES) or _is_outer_product(node):
                computed = [
                    v for v in node.inputs if _is_float(v) and v is not None and frozen_array(v) is None
                ]
                if computed and all(v in found for v in computed):
                    found.update(node.outputs)
        # Sine and cosine are where positions end: what is behind them is a number like any other.
        return found - {o for node in self.nodes if is_op(node, *PHASES) for o in node.outputs}

    def _mask_constants(self) -> list[ir.Value]:
        constants = {
            v: None for n in self.nodes for v in n.inputs if v is not None and "overflows" in self._misfit(v)
        }
        return [v for v in constants if _is_mask(frozen_array(v), self.fmt) and _only_reaches_softmax(v)]

    def _too_large(self) -> dict[ir.Value, str]:
        """Return computed values that the narrow type cannot hold, with the reason."""
        found: dict[ir.Value, str] = {}
        values = [v for n in self.nodes for v in n.inputs if v is not None and v.producer() is None]
        for value in dict.fromkeys(values):
            if value.name in self.ranges and (why := self._bad_range(value)):
                found[value] = why
        for node in self.nodes:
            inherited = "" if is_op(node, *BOUNDED) else self._inherited(node, found)
            for value in node.outputs:
                why = self._bad_range(value) if value.name in self.ranges else inherited
                if why and _is_float(value) and not (why is inherited and value in self.masked):
                    found[value] = why
        return found

    def _inherited(self, node: ir.Node, found: Mapping[ir.Value, str]) -> str:
        """Tell of an operand that is too large, which the result of unknown range may be, too."""
        if is_op(node, "ConstantOfShape"):
            tensor = node.attributes.get_tensor("value", None)
            fill = None if tensor is None else tensor.numpy()
            return "" if fill is None or fill.dtype != np.float32 else fits(fill, self.fmt)
        for value in node.inputs:
            if value is None or not _is_float(value) or value in self.masks or is_op(node, "Clip"):
                continue
            if why := found.get(value) or self._misfit(value):
                return why if "overflows" in why else ""
        return ""

    def _bad_range(self, value: ir.Value) -> str:
        low, high = self.ranges[value.name or ""]
        low = max(low, 0.0) if value in self.masked else low
        largest = max(abs(low), abs(high))
        if largest > self.limit:
            return f"tensor '{value.name}' reaches {largest:.3g}, which overflows {self.fmt.name} with its headroom"
        if 0 < largest < self.fmt.smallest_normal:
            return f"tensor '{value.name}' stays below {largest:.3g}, which underflows {self.fmt.name}"
        return ""

    def _widen_statistics(self, found: Decisions) -> None:
        guards = [
            n
            for n in self.nodes
            if is_op(n, *GUARDS) and "underflows" in found.reasons.get(node_label(n), "")
        ]
        for node in dict.fromkeys(m for guard in guards for m in _statistics_around(guard)):
            if found.narrow.pop(node, None) is not None:
                found.reasons[node_label(node)] = "it computes the statistics that a small constant guards"


def _is_integer(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_integer()


def _is_outer_product(node: ir.Node) -> bool:
    """Tell whether a MatMul multiplies without summing: rotary angles are positions times frequencies."""
    sides = [frozen_array(v) for v in node.inputs] if is_op(node, "MatMul") else []
    left, right = (*sides, None, None)[:2]
    return (left is not None and left.ndim > 1 and left.shape[-1] == 1) or (
        right is not None and right.ndim > 1 and right.shape[-2] == 1
    )


def _is_mask(array: np.ndarray | None, fmt: FloatFormat) -> bool:
    """Tell whether every element either leaves a score as it is (0, 1) or pushes it out of range."""
    if array is None:
        return False
    return bool(((array == 0) | (array == 1) | (array < -fmt.largest)).all())


def _behind_masks(masks: list[ir.Value]) -> Iterator[ir.Value]:
    """Yield every value that carries a mask, up to the Softmax."""
    seen: set[ir.Value] = set()
    pending = list(masks)
    while pending:
        value = pending.pop()
        for node in consumers(value):
            for output in node.outputs:
                if node.op_type != "Softmax" and output not in seen:
                    seen.add(output)
                    pending.append(output)
                    yield output


def _only_reaches_softmax(value: ir.Value) -> bool:
    """Tell whether all ways from ``value`` lead through additions, choices and moves into a Softmax."""
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        current = pending.pop()
        readers = consumers(current)
        if current.is_graph_output() or not readers:
            return False
        for node in readers:
            if is_op(node, "Softmax"):
                continue
            if not is_op(node, *CARRIES_A_MASK):
                return False
            pending += [o for o in node.outputs if o not in seen]
            seen.update(node.outputs)
    return True


def _statistics_around(guard: ir.Node) -> Iterator[ir.Node]:
    """Yield what makes the guarded denominator and what divides by it."""
    pending = [v for v in guard.inputs if v is not None]
    while pending:
        node = pending.pop().producer()
        if node is not None and (is_op(node, *BEFORE_A_GUARD) or _squares(node)):
            yield node
            pending += [v for v in node.inputs if v is not None]
    behind = list(guard.outputs)
    while behind:
        for node in consumers(behind.pop()):
            if is_op(node, *BEHIND_A_GUARD):
                yield node
                behind += [o for o in node.outputs if node.op_type not in LAST_BEHIND_A_GUARD]


def _squares(node: ir.Node) -> bool:
    return is_op(node, "Mul") and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
