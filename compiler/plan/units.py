"""Units of work: a node together with the nodes that the runtime fuses behind it; no quantizer goes inside a unit."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, node_label, only_consumer
from bitwright.compiler.graph.operands import activations_of, weight_array, weight_of
from bitwright.compiler.plan.support import why_unsupported
from bitwright.targets.schema import Combo, OpRule, Profile, Runtime


@dataclass(frozen=True, eq=False)
class Unit:
    """A node and its fused tail.

    Attributes:
        head: The node that decides which kernel runs.
        tail: Nodes fused behind it, in order (bias Add, Relu, Clip).
        rule: The profile's rule for the head, or None if the operator is absent from the table.
        combo: The kernel that would run, or None if the unit must stay in float.
        why_float: Why ``combo`` is None.
    """

    head: ir.Node
    tail: tuple[ir.Node, ...]
    rule: OpRule | None
    combo: Combo | None
    why_float: str = ""

    @property
    def output(self) -> ir.Value:
        """The value the unit writes."""
        return (self.tail[-1] if self.tail else self.head).outputs[0]

    @property
    def activations(self) -> tuple[ir.Value, ...]:
        """The values the unit would read as integers."""
        return activations_of(self.head)

    @property
    def role(self) -> str:
        """The profile's role, "" without a rule."""
        return self.rule.role if self.rule else ""

    @property
    def name(self) -> str:
        """The head's label."""
        return node_label(self.head)


def _is_bias_add(head: ir.Node, node: ir.Node) -> bool:
    weight = weight_of(head)
    constants = [a for a in (constant_array(v) for v in node.inputs) if a is not None]
    return weight is not None and len(constants) == 1 and constants[0].size == weight_array(weight).shape[-1]


def _fuses(head: ir.Node, node: ir.Node) -> bool:
    """Tell whether ``node`` has the form that fuses behind ``head`` (a constant bias, constant bounds)."""
    if node.op_type == "Add":
        return head.op_type == "MatMul" and _is_bias_add(head, node)
    if node.op_type == "Clip":
        return all(v is None or constant_array(v) is not None for v in node.inputs[1:])
    return True


def fused_tail(head: ir.Node, fusions: tuple[tuple[str, ...], ...]) -> tuple[ir.Node, ...]:
    """Return the longest chain behind ``head`` that matches one of the fusions."""
    best: tuple[ir.Node, ...] = ()
    for pattern in fusions:
        if pattern[0] != head.op_type:
            continue
        chain: list[ir.Node] = []
        current = head
        for op_type in pattern[1:]:
            following = only_consumer(current.outputs[0])
            if following is None or following.op_type != op_type or not _fuses(head, following):
                break
            chain.append(following)
            current = following
        if len(chain) == len(pattern) - 1 and len(chain) > len(best):
            best = tuple(chain)
    return best


def _unit(node: ir.Node, runtime: Runtime, profile: Profile) -> Unit:
    rule = runtime.ops.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rule is None:
        return Unit(node, (), None, None, f"{node.op_type} has no integer kernel on this target")
    reason = why_unsupported(node, rule, profile.limits)
    if reason is not None:
        return Unit(node, (), rule, None, reason)
    return Unit(node, fused_tail(node, runtime.fusions), rule, rule.combos[0])


def build_units(model: ir.Model, runtime: Runtime, profile: Profile) -> list[Unit]:
    """Cut the main graph into units, in graph order; a node inside a unit's tail has no unit of its own."""
    units: list[Unit] = []
    fused: set[ir.Node] = set()
    for node in model.graph:
        if node in fused:
            continue
        unit = _unit(node, runtime, profile)
        fused.update(unit.tail)
        units.append(unit)
    return units
