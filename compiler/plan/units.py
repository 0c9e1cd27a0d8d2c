"""Units of work: a node together with the nodes that the runtime fuses behind it; no quantizer goes inside a unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from bitwright.compiler.graph.model import constant_array, int_attribute, node_label, only_consumer
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
        added_to: For a residual Add: what the product in front of it writes; the kernel adds the other operand.
    """

    head: ir.Node
    tail: tuple[ir.Node, ...]
    rule: OpRule | None
    combo: Combo | None
    why_float: str = ""
    reads_integers: bool = True
    float_format: str = "float"
    added_to: ir.Value | None = None

    @property
    def output(self) -> ir.Value:
        """The value the unit writes."""
        return (self.tail[-1] if self.tail else self.head).outputs[0]

    @property
    def activations(self) -> tuple[ir.Value, ...]:
        """The values the unit would read as integers: none if its kernel takes float activations."""
        found = activations_of(self.head) if self.reads_integers else ()
        return tuple(v for v in found if v is not self.added_to)

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
    misaligned = _misaligned(node, combo)
    if misaligned:
        return Unit(node, (), rule, None, misaligned, float_format=narrow)
    reads_integers = profile.qspace(combo.act).calibrated
    return Unit(node, fused_tail(node, runtime.fusions), rule, combo, reads_integers=reads_integers)


def _misaligned(node: ir.Node, combo: Combo) -> str:
    """Return why a convolution's channels do not fit its kernel, "" if they do."""
    weight, multiple = weight_of(node), combo.channel_multiple
    if weight is None or node.op_type != "Conv" or multiple == 1:
        return ""
    group = int_attribute(node, "group", 1)
    outputs, inputs = weight_array(weight).shape[:2]
    if inputs % multiple or (outputs // group) % multiple:
        return f"its {combo.format} kernel takes channels in multiples of {multiple} ({node_label(node)})"
    return ""


# What may stand between a product and the residual Add that its kernel takes in.
_BEFORE_RESIDUAL = ("Add",)


def _as_residual(unit: Unit, writers: Mapping[ir.Value, Unit]) -> Unit:
    """Return the unit of an Add with the product it is fused behind, the last one if both operands are products."""
    found = [v for v in activations_of(unit.head) if _ends_product(writers.get(v), v)]
    if unit.combo is None or not found or len(set(activations_of(unit.head))) < 2:
        why = (
            unit.why_float or f"no quantized product writes an operand of it alone ({node_label(unit.head)})"
        )
        return replace(unit, tail=(), combo=None, why_float=why)
    order = list(writers)
    main = max(found, key=order.index)
    product = writers[main].combo
    combo = unit.rule.combo_for((product.format,)) if product is not None and unit.rule is not None else None
    if combo is None:
        why = f"the product in front of it has another format ({node_label(unit.head)})"
        return replace(unit, tail=(), combo=None, why_float=why)
    return replace(unit, combo=combo, added_to=main)


def _ends_product(writer: Unit | None, value: ir.Value) -> bool:
    return (
        writer is not None
        and writer.role == "anchor"
        and writer.combo is not None
        and writer.reads_integers
        and only_consumer(value) is not None
        and all(node.op_type in _BEFORE_RESIDUAL for node in writer.tail)
    )


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
    writers: dict[ir.Value, Unit] = {}
    for node in model.graph:
        if node in fused:
            continue
        unit = _unit(node, runtime, profile, formats)
        if unit.role == "residual":
            unit = _as_residual(unit, writers)
        fused.update(unit.tail)
        writers[unit.output] = unit
        units.append(unit)
    return units
