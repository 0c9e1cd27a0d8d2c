"""Units of work: a node together with the nodes that the runtime fuses behind it; no quantizer goes inside a unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, node_label, only_consumer
from bitwright.compiler.graph.operands import activations_of, weight_array, weight_of
from bitwright.compiler.plan.support import why_unsupported, why_weight_unfit
from bitwright.targets.schema import Combo, OpRule, Profile, Runtime


@dataclass(frozen=True)
class FormatChoice:
    """Which of the target's formats may be used, best first; what none of them covers stays in float.

    Attributes:
        anchors: For operators with a constant weight.
        others: For followers and carriers.
        tables: For embedding tables.
        by_node: Format of single nodes, by label; overrides the rest. ``"float"`` keeps a node in float.
    """

    anchors: tuple[str, ...] = ("int8",)
    others: tuple[str, ...] = ("int8",)
    tables: tuple[str, ...] = ("int8",)
    by_node: Mapping[str, str] = field(default_factory=dict)

    def allowed(self, node: ir.Node, rule: OpRule | None) -> tuple[str, ...]:
        """Return the formats to try for a node."""
        label = node_label(node)
        if label in self.by_node:
            return (self.by_node[label],)
        if rule is not None and rule.role == "table":
            return self.tables
        return self.anchors if rule is not None and rule.role == "anchor" else self.others

    def float_format(self, node: ir.Node, rule: OpRule | None, runtime: Runtime) -> str:
        """Return the floating point format of a node without a kernel in an integer format."""
        return next((f for f in self.allowed(node, rule) if f in runtime.float_formats), "float")


INT8 = FormatChoice()


@dataclass(frozen=True, eq=False)
class Unit:
    """A node and its fused tail.

    Attributes:
        head: The node that decides which kernel runs.
        tail: Nodes fused behind it, in order (bias Add, Relu, Clip).
        rule: The profile's rule for the head, or None if the operator is absent from the table.
        combo: The kernel that would run, or None if the unit must stay in float.
        why_float: Why ``combo`` is None.
        reads_integers: The kernel reads activations whose scale is known beforehand.
        float_format: Without a combo: ``"float"``, or the half-precision format it is computed in.
    """

    head: ir.Node
    tail: tuple[ir.Node, ...]
    rule: OpRule | None
    combo: Combo | None
    why_float: str = ""
    reads_integers: bool = True
    float_format: str = "float"

    @property
    def output(self) -> ir.Value:
        """The value the unit writes."""
        return (self.tail[-1] if self.tail else self.head).outputs[0]

    @property
    def activations(self) -> tuple[ir.Value, ...]:
        """The values the unit would read as integers: none if its kernel takes float activations."""
        return activations_of(self.head) if self.reads_integers else ()

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


def _unit(node: ir.Node, runtime: Runtime, profile: Profile, formats: FormatChoice) -> Unit:
    rule = runtime.ops.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    narrow = formats.float_format(node, rule, runtime)
    if rule is None:
        why = f"{node.op_type} has no integer kernel on this target"
        return Unit(node, (), None, None, why, float_format=narrow)
    reason = why_unsupported(node, rule, profile.limits)
    if reason is not None:
        return Unit(node, (), rule, None, reason, float_format=narrow)
    allowed = formats.allowed(node, rule)
    combo, why = _kernel(node, rule, allowed, profile)
    if combo is None:
        why = why or _why_no_kernel(node, allowed, narrow)
        return Unit(node, (), rule, None, why, float_format=narrow)
    reads_integers = profile.qspace(combo.act).calibrated
    return Unit(node, fused_tail(node, runtime.fusions), rule, combo, reads_integers=reads_integers)


def _kernel(
    node: ir.Node, rule: OpRule, allowed: tuple[str, ...], profile: Profile
) -> tuple[Combo | None, str]:
    """Return the kernel of the first format that the weight can be stored in, or None and why there is none."""
    unfit = ""
    for name in allowed:
        combo = rule.combo_for((name,))
        if combo is None:
            continue
        why = why_weight_unfit(node, profile.qspace(combo.weight)) if combo.weight else None
        if why is None:
            return combo, ""
        unfit = unfit or f"{why} ({node_label(node)})"
    return None, unfit


def _why_no_kernel(node: ir.Node, allowed: tuple[str, ...], narrow: str) -> str:
    if narrow != "float":
        return f"computed in {narrow}"
    wanted = " or ".join(f for f in allowed if f != "float")
    return f"{node.op_type} has no {wanted} kernel on this target" if wanted else "kept in float by the plan"


def build_units(
    model: ir.Model, runtime: Runtime, profile: Profile, formats: FormatChoice = INT8
) -> list[Unit]:
    """Cut the main graph into units, in graph order; a node inside a unit's tail has no unit of its own.

    Args:
        model: A normalized model.
        runtime: The profile's table that is planned for.
        profile: The target.
        formats: Which kernels may be used.
    """
    units: list[Unit] = []
    fused: set[ir.Node] = set()
    for node in model.graph:
        if node in fused:
            continue
        unit = _unit(node, runtime, profile, formats)
        fused.update(unit.tail)
        units.append(unit)
    return units
