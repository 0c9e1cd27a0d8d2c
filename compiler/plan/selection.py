"""Which units run on integers: anchors that earn it, and the followers and carriers between them.

A follower (Add, pooling, ...) is worth its integers only if every operand already is an integer and somebody wants the
result as one; a carrier (Reshape, MaxPool, ...) goes with its neighbours. Both conditions depend on the neighbours'
decision, so the set is the greatest fixed point: start with everything that has a kernel, remove what lacks support.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, consumers
from bitwright.compiler.plan.units import Unit
from bitwright.targets.schema import Profile

# Roles whose kernels can leave a float result; the others write the integers they were given.
WRITES_FLOAT = ("anchor", "table", "residual")


@dataclass(frozen=True)
class Selection:
    """The outcome.

    Attributes:
        units: All units in graph order.
        integer: Those that run on integers.
        reasons: Unit name -> why it runs as it does.
        quantized: Values that get a quantizer, in graph order.
        float_readers: Of these, values whose float consumers read the unquantized value.
    """

    units: tuple[Unit, ...]
    integer: frozenset[Unit]
    reasons: dict[str, str]
    quantized: tuple[ir.Value, ...]
    float_readers: frozenset[ir.Value]


class _Neighbours:
    """Who produces and who reads a value, in units."""

    def __init__(self, units: list[Unit]) -> None:
        self.producer = {unit.output: unit for unit in units}
        self._unit_of = {node: unit for unit in units for node in (unit.head, *unit.tail)}

    def readers(self, value: ir.Value) -> list[Unit]:
        """Units that read ``value`` as an activation."""
        found = (self._unit_of.get(node) for node in consumers(value))
        return [u for u in dict.fromkeys(found) if u is not None and value in u.activations]

    def others_read(self, value: ir.Value) -> bool:
        """Whether something outside the activations (another operand, a subgraph, the outside) reads ``value``."""
        if value.is_graph_output():
            return True
        return any(
            (unit := self._unit_of.get(node)) is None or value not in unit.activations
            for node in consumers(value)
        )


def _prefers_integer_output(unit: Unit, profile: Profile) -> bool:
    return unit.combo is not None and profile.qspace(unit.combo.out[0]).calibrated


def _writes_only_integers(unit: Unit, profile: Profile) -> bool:
    return unit.combo is not None and all(profile.qspace(q).calibrated for q in unit.combo.out)


def _follower_lacks(unit: Unit, chosen: set[Unit], neighbours: _Neighbours, profile: Profile) -> str | None:
    lacking = {v: why for v in unit.activations if (why := _is_float(v, chosen, neighbours, profile))}
    # A gate (squeeze and excitation) is one value a channel: rounding it here costs little, and the tensor that it
    # scales stays in integers.
    big = [why for value, why in lacking.items() if not _one_value_a_channel(value)]
    if big or len(lacking) == len(unit.activations):
        return next(iter([*big, *lacking.values()]))
    if not any(reader in chosen for reader in neighbours.readers(unit.output)):
        return "nothing behind it reads integers"
    return None


def _is_float(value: ir.Value, chosen: set[Unit], neighbours: _Neighbours, profile: Profile) -> str:
    """Return why a value is no integer where a follower reads it, "" if it is one."""
    source = neighbours.producer.get(value)
    if source is None or source not in chosen:
        return f"its operand '{value.name}' is computed in float"
    if source.role in WRITES_FLOAT and not _prefers_integer_output(source, profile):
        return f"its operand '{value.name}' is a float result; rounding it to 8 bits here would cost accuracy"
    return ""


def _one_value_a_channel(value: ir.Value) -> bool:
    dims = () if value.shape is None else tuple(value.shape.dims)
    return len(dims) == 4 and dims[2:] == (1, 1)


def _carrier_lacks(unit: Unit, chosen: set[Unit], neighbours: _Neighbours) -> str | None:
    readers = neighbours.readers(unit.output)
    if not any(reader in chosen for reader in readers):
        return "nothing behind it reads integers"
    source = neighbours.producer.get(unit.activations[0])
    if source is not None and source in chosen:
        return None
    if neighbours.others_read(unit.output) or any(reader not in chosen for reader in readers):
        return "a float operator reads the same value"
    return None


def _residual_lacks(unit: Unit, chosen: set[Unit], neighbours: _Neighbours) -> str | None:
    assert unit.added_to is not None
    if neighbours.producer.get(unit.added_to) not in chosen:
        return "the product in front of it is computed in float"
    if not any(reader in chosen for reader in neighbours.readers(unit.output)):
        return "nothing behind it reads integers"
    return None


def _lacks(unit: Unit, chosen: set[Unit], neighbours: _Neighbours, profile: Profile) -> str | None:
    if unit.role == "follower":
        return _follower_lacks(unit, chosen, neighbours, profile)
    if unit.role == "carrier":
        return _carrier_lacks(unit, chosen, neighbours)
    if unit.role == "residual":
        return _residual_lacks(unit, chosen, neighbours)
    return None


def _fixed_point(
    units: list[Unit], chosen: set[Unit], neighbours: _Neighbours, profile: Profile, reasons: dict[str, str]
) -> None:
    changed = True
    while changed:
        changed = False
        for unit in units:
            if unit in chosen and (reason := _lacks(unit, chosen, neighbours, profile)) is not None:
                chosen.discard(unit)
                reasons[unit.name] = reason
                changed = True


def _needs_quantizer(value: ir.Value, chosen: set[Unit], neighbours: _Neighbours, profile: Profile) -> bool:
    source = neighbours.producer.get(value)
    if any(reader in chosen for reader in neighbours.readers(value)):
        return True
    return (
        source is not None
        and source in chosen
        and (source.role not in WRITES_FLOAT or _writes_only_integers(source, profile))
    )


def _keeps_float_copy(value: ir.Value, chosen: set[Unit], neighbours: _Neighbours, profile: Profile) -> bool:
    source = neighbours.producer.get(value)
    if source is None or source not in chosen:
        return True
    return source.role in WRITES_FLOAT and not _prefers_integer_output(source, profile)


def _values_in_order(units: list[Unit]) -> list[ir.Value]:
    seen: dict[ir.Value, None] = {}
    for unit in units:
        for value in (*unit.activations, unit.output):
            if constant_array(value) is None:
                seen.setdefault(value)
    return list(seen)


def select(
    units: list[Unit],
    profile: Profile,
    *,
    keep_float: frozenset[str] = frozenset(),
    integer_only: bool = False,
) -> Selection:
    """Choose the integer units.

    Args:
        units: From :func:`bitwright.compiler.plan.units.build_units`.
        profile: The target.
        keep_float: Names of heads that must stay in float (a user's recipe, a gate's verdict).
        integer_only: What has an integer kernel runs on it, whatever its neighbours do.
    """
    neighbours = _Neighbours(units)
    reasons = {u.name: u.why_float for u in units if u.combo is None}
    reasons |= dict.fromkeys(keep_float, "kept in float on request")
    chosen = {u for u in units if u.combo is not None and u.name not in keep_float}
    if not integer_only:
        _fixed_point(units, chosen, neighbours, profile, reasons)
    for unit in chosen:
        reasons[unit.name] = "the target computes integers only" if integer_only else _why_integer(unit)
    values = _values_in_order(units)
    quantized = tuple(v for v in values if _needs_quantizer(v, chosen, neighbours, profile))
    copies = frozenset(v for v in quantized if _keeps_float_copy(v, chosen, neighbours, profile))
    return Selection(tuple(units), frozenset(chosen), reasons, quantized, copies)


def _why_integer(unit: Unit) -> str:
    if unit.role == "table":
        assert unit.combo is not None
        bits = "8 bits" if unit.combo.format == "int8" else f"the format {unit.combo.format}"
        return f"a constant table, stored in {bits} and dequantized behind the look-up"
    if unit.role == "anchor" and not unit.reads_integers:
        assert unit.combo is not None
        return f"a constant-weight operator with a kernel for the format {unit.combo.format}"
    if unit.role == "anchor":
        return "a constant-weight operator with an integer kernel"
    if unit.role == "residual":
        return "the kernel of the product in front of it adds its other operand in 8 bits"
    if unit.role == "follower":
        return "its operands are integers already and an integer operator reads it"
    return "moves integers between integer operators unchanged"
