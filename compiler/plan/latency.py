"""Predicted seconds of a whole placement: its operators in their formats, and the conversions between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.cost import Shapes
from bitwright.compiler.graph.model import consumers
from bitwright.compiler.graph.operands import weight_of
from bitwright.compiler.plan.cost import RuntimeName, boundary, call_overhead, estimate_call
from bitwright.compiler.plan.measured import Estimate, Source
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.signature import DEQUANTIZE, QUANTIZE
from bitwright.compiler.plan.units import Unit, fused_tail
from bitwright.targets.schema import Profile, Runtime

SOURCES: tuple[Source, ...] = ("measured", "fitted", "modelled")
LEAST_SHARE = 0.005


@dataclass(frozen=True)
class Chain:
    """A unit with everything that the runtime fuses behind its head, whatever its format.

    Attributes:
        unit: The unit.
        tail: Nodes behind its head.
        format: ``"float"`` or the name of a format.
        writes: ``"q"`` or ``"f"`` for an integer unit that writes integers or float, "" for a float one.
    """

    unit: Unit
    tail: tuple[ir.Node, ...]
    format: str
    writes: str


@dataclass(frozen=True)
class Crossing:
    """A tensor that is converted between float and integers.

    Attributes:
        value: The tensor.
        format: Of the operators on the integer side.
        operator: ``QuantizeLinear`` where it enters an integer region, ``DequantizeLinear`` where it leaves one.
    """

    value: ir.Value
    format: str
    operator: str


@dataclass(frozen=True)
class Part:
    """What one operator or one conversion adds to the prediction.

    Attributes:
        name: Name of the operator or of the converted tensor.
        operator: Operator type.
        format: Its format.
        seconds: Predicted.
        source: Where the number comes from.
    """

    name: str
    operator: str
    format: str
    seconds: float
    source: Source


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one call of a model.

    Attributes:
        parts: Operators in graph order, then conversions.
        call_s: What a call takes beside them.
        unknown: Operators left out because a shape is unknown.
    """

    parts: tuple[Part, ...]
    call_s: float
    unknown: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """The sum."""
        return self.call_s + sum(p.seconds for p in self.parts)

    def share(self, source: Source) -> float:
        """Return the share of the seconds that come from one source."""
        total = sum(p.seconds for p in self.parts)
        return sum(p.seconds for p in self.parts if p.source == source) / total if total > 0 else 0.0

    @property
    def origin(self) -> str:
        """Where the seconds come from, in words."""
        shares = [(s, self.share(s)) for s in SOURCES]
        found = [(name, share) for name, share in shares if share > LEAST_SHARE]
        if len(found) == 1:
            return found[0][0]
        return ", ".join(f"{share:.0%} {name}" for name, share in found)


def predict(selection: Selection, profile: Profile, runtime: RuntimeName, shapes: Shapes) -> Prediction:
    """Predict the time of a placement.

    Args:
        selection: Which units run in which format.
        profile: The target.
        runtime: Which of the two runtimes.
        shapes: Static shape of every tensor at the planning sizes.

    Raises:
        ProfileError: An operator has no kernel for its format.
    """
    parts: list[Part] = []
    unknown: list[str] = []
    table = profile.runtimes.artifact if runtime == "artifact" else profile.runtimes.onnxruntime
    everything = chains(selection, table)
    for chain, neighbour in zip(everything, formats_before(everything), strict=True):
        head = chain.unit.head
        try:
            found = estimate_call(
                head,
                shapes,
                profile,
                runtime,
                chain.format,
                float_output=chain.writes == "f",
                neighbour=neighbour,
            )
        except ModelError:
            unknown.append(chain.unit.name)
            continue
        parts.append(_part(chain.unit.name, head.op_type, chain.format, found))
    for crossing in crossings(selection):
        name = crossing.value.name or ""
        if name not in shapes:
            unknown.append(name)
            continue
        found = boundary(shapes[name], profile, runtime, crossing.format, crossing.operator)
        parts.append(_part(name, crossing.operator, crossing.format, found))
    return Prediction(tuple(parts), call_overhead(profile, runtime), tuple(unknown))


def predict_float(selection: Selection, profile: Profile, runtime: RuntimeName, shapes: Shapes) -> Prediction:
    """Predict the time of the same model with everything in float; the arguments are those of :func:`predict`."""
    units = tuple(replace(unit, float_format="float") for unit in selection.units)
    nothing = Selection(units, frozenset(), selection.reasons, (), frozenset())
    return predict(nothing, profile, runtime, shapes)


def _part(name: str, operator: str, fmt: str, found: Estimate) -> Part:
    return Part(name, operator, fmt, found.seconds, found.source)


def chains(selection: Selection, runtime: Runtime) -> list[Chain]:
    """Return the units with their fused tails, in graph order; a node in a tail heads no chain of its own."""
    result: list[Chain] = []
    absorbed: set[ir.Node] = set()
    for unit in selection.units:
        if unit.head in absorbed:
            continue
        tail = unit.tail or fused_tail(unit.head, runtime.fusions)
        absorbed.update(tail)
        if unit in selection.integer and unit.combo is not None:
            writes = "q" if unit.output in selection.quantized else "f"
            result.append(Chain(unit, tail, unit.combo.format, writes))
        else:
            result.append(Chain(unit, tail, unit.float_format, ""))
    return result


def formats_before(everything: Sequence[Chain]) -> list[str]:
    """Return, for each chain, the format of the last layer with a constant weight that runs before it.

    Calls follow each other, so before the first layer of a call comes the last of the one before; "" where no chain
    has a weight.
    """
    weighted = [weight_of(chain.unit.head) is not None for chain in everything]
    last = next(
        (c.format for c, is_layer in zip(everything[::-1], weighted[::-1], strict=True) if is_layer), ""
    )
    found = []
    for chain, is_layer in zip(everything, weighted, strict=True):
        found.append(last)
        last = chain.format if is_layer else last
    return found


def crossings(selection: Selection) -> list[Crossing]:
    """Return the conversions of a placement, in graph order.

    A result that the runtime writes as integers is dequantized for its float readers; one that it writes as float
    is quantized by the operator that wrote it, and costs nothing more to read.
    """
    producer = {unit.output: unit for unit in selection.units}
    readers = {v: u for u in reversed(selection.units) if u in selection.integer for v in u.activations}
    integer = {n for u in selection.integer if u.reads_integers for n in (u.head, *u.tail)}
    result = []
    for value in selection.quantized:
        source = producer.get(value)
        if source is None or source not in selection.integer:
            reader = readers.get(value)
            if reader is not None and reader.combo is not None:
                result.append(Crossing(value, reader.combo.format, QUANTIZE))
            continue
        outside = value.is_graph_output() or any(n not in integer for n in consumers(value))
        if outside and value not in selection.float_readers and source.combo is not None:
            result.append(Crossing(value, source.combo.format, DEQUANTIZE))
    return result
