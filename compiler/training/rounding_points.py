"""Where a plan rounds: which quantizer each operand of each node passes, by the rules of Q/DQ insertion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor, nn

from bitwright.compiler.errors import UsageError
from bitwright.compiler.graph.model import constant_array, ints_attribute, node_label
from bitwright.compiler.graph.operands import activations_of, stored_weight, table_of, weight_array, weight_of
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.training.fake_quantization import straight_through
from bitwright.compiler.training.quantizers import ActivationQuantizer, Scaling, WeightQuantizer

BIAS_BOUND = 2.0**31 - 1


@dataclass(frozen=True)
class _Operands:
    """What is rounded of a node's inputs.

    Attributes:
        activations: Input index -> tensor of the plan.
        weight: (input index, key in the plan), None without.
        bias: The bias is rounded to the accumulator's scale.
    """

    activations: Mapping[int, str]
    weight: tuple[int, str] | None
    bias: bool


class RoundingPoints(nn.Module):
    """All quantizers of a plan; tensors that the plan ties to one scale share one.

    Args:
        plan: What is rounded how.
        model: The float model that the plan was made for.
        levels: Tensor -> (smallest, largest integer) of activations.
        scaling: How scales of two or three values are found.

    Raises:
        UsageError: A format finds its scales at run time, or has no grid.
    """

    def __init__(
        self, plan: Plan, model: ir.Model, levels: Mapping[str, tuple[int, int]], scaling: Scaling
    ) -> None:
        super().__init__()
        for decision in plan.nodes.values():
            if decision.format in ("int8-dynamic", "int8-row", "fp16", "bf16", "fp8"):
                what = f"the format {decision.format} ({decision.node}) has no scales to be trained"
                raise UsageError(what, where="--recipe", fix="e.g. --recipe int8, w4a8, ternary or w4")
        self.plan = plan
        self._operands = {
            label: found
            for node in model.graph
            if (found := _operands(node, plan, label := node_label(node))) is not None
        }
        tied = {name: quant.tie or name for name, quant in plan.activations.items()}
        leaders = dict.fromkeys(tied.values())
        self._activation_place = {name: list(leaders).index(tied[name]) for name in tied}
        self.activations = nn.ModuleList(
            ActivationQuantizer(plan.activations[leader], *levels[leader]) for leader in leaders
        )
        shapes, self.weight_names = _weights_as_read(model, plan)
        self.biases = {
            label: node.inputs[2].name or ""
            for node in model.graph
            if (o := self._operands.get(label := node_label(node))) is not None
            and o.bias
            and node.inputs[2] is not None
        }
        self._weight_place = {key: k for k, key in enumerate(shapes)}
        self.weights = nn.ModuleList(
            WeightQuantizer(plan.weights[key], shape, scaling) for key, shape in shapes.items()
        )

    def activation(self, tensor: str) -> ActivationQuantizer:
        """Return the quantizer of a tensor."""
        found: ActivationQuantizer = self.activations[self._activation_place[tensor]]
        return found

    def weight(self, key: str) -> WeightQuantizer:
        """Return the quantizer of a weight's entry in the plan."""
        found: WeightQuantizer = self.weights[self._weight_place[key]]
        return found

    def round_inputs(
        self, node: ir.Node, inputs: Sequence[Tensor | None], known: dict[str, Tensor]
    ) -> list[Tensor | None]:
        """Return a node's inputs as a Q/DQ model would hand them over.

        Args:
            node: The node.
            inputs: Float.
            known: Tensors that were rounded for an earlier reader; extended.
        """
        operands = self._operands.get(node_label(node))
        result = list(inputs)
        if operands is None:
            return result
        for index, tensor in operands.activations.items():
            value = result[index]
            assert value is not None, "the plan quantizes tensors that exist"
            if tensor not in known:
                known[tensor] = self.activation(tensor)(value)
            result[index] = known[tensor]
        if operands.weight is not None:
            self._round_weight(operands, result)
        return result

    def _round_weight(self, operands: _Operands, inputs: list[Tensor | None]) -> None:
        assert operands.weight is not None
        index, key = operands.weight
        weight, quantizer = inputs[index], self.weight(key)
        assert weight is not None, "the plan quantizes weights that exist"
        if operands.bias and inputs[2] is not None:
            scale = self.activation(operands.activations[0]).scale() * quantizer.scale(weight)
            steps = (inputs[2].detach() / scale.detach()).round().clamp(-BIAS_BOUND, BIAS_BOUND)
            inputs[2] = straight_through(inputs[2], steps * scale.detach())
        inputs[index] = quantizer(weight)

    def round_output(self, name: str, value: Tensor) -> Tensor:
        """Return a graph output as a Q/DQ model would give it."""
        quant = self.plan.activations.get(name)
        return value if quant is None or quant.float_copy else self.activation(name)(value)


def _operands(node: ir.Node, plan: Plan, label: str) -> _Operands | None:
    decision = plan.nodes.get(label)
    activations = {}
    for index, value in enumerate(node.inputs):
        quant = None if value is None else plan.activations.get(value.name or "")
        if value is None or quant is None:
            continue
        integer = decision is not None and decision.integer and value in activations_of(node)[: index + 1]
        if integer or not quant.float_copy:
            activations[index] = quant.tensor
    weight = None
    if decision is not None and decision.weight:
        weight = (1 if weight_of(node) is not None else 0, decision.weight)
    if not activations and weight is None:
        return None
    bias = node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2
    constant = bias and constant_array(node.inputs[2]) is not None
    rounds_bias = bool(decision and decision.integer and weight and constant)
    return _Operands(activations, weight, rounds_bias)


def _weights_as_read(
    model: ir.Model, plan: Plan
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[str, tuple[int, ...] | None]]]:
    """Return, by key in the plan, the shape a weight's readers see, and its initializer with their transposition."""
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for node in model.graph:
        decision = plan.nodes.get(node_label(node))
        weight = weight_of(node) or table_of(node)
        if decision is None or not decision.weight or weight is None or decision.weight in shapes:
            continue
        shapes[decision.weight] = weight_array(weight).shape
        stored, turned = stored_weight(weight), weight.producer()
        order = None
        if stored is not weight and turned is not None:
            backwards = tuple(reversed(range(weight_array(weight).ndim)))
            order = ints_attribute(turned, "perm", backwards)
        sources[decision.weight] = ((stored.name if stored is not None else "") or "", order)
    return shapes, sources
