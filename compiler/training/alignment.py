"""Rounded layers brought back to the float model's means and variances while training looks for their integers.

A 2-bit weight that changes its level moves the mean and the spread of all that its channel computes, and every layer
behind it sees inputs it was not trained for. Networks that are trained in few bits from the start have batch
normalization behind each product, which undoes that at once (Ioffe and Szegedy 2015, section 3); a deployed model has
its normalization folded into the weights. So, in the first half of training, each channel of a convolution of 2- or
3-bit weights is given the mean and the variance which the *float* model has on the same batch, whatever the batch is
(plain, augmented or mixed):

    y' = (y - mean(y)) / sqrt(var(y) + e) * sqrt(var(t) + e) * gain + mean(t) + sqrt(var(t) + e) * shift

for the student's ``y``, the teacher's ``t``, and a gain (1 at first) and a shift (0) that are learned. What is judged
and written has none of this: the factor goes into the scale of the channel's weights, whose integers stay as they are,
the rest into the bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bitwright.compiler.graph.model import node_label
from bitwright.compiler.plan.model import WeightQuant
from bitwright.compiler.training.graph_module import GraphModule
from bitwright.compiler.training.quantizers import WeightQuantizer
from bitwright.compiler.training.rounding_points import RoundingPoints

CHANNELS = 1  # the axis of a convolution's output
# Bits of the weights. Four move moments little, and what GPTQ and corrected biases have found for them is better kept:
# aligned, resnet8 with 4-bit weights and activations lost 1.5 points on one half of its images, else none.
WIDEST = 3
# Of a channel in a batch: the moments of fewer would say more about the batch than about the layer.
FEWEST_VALUES = 128
# Added to variances, as a share of the layer's mean variance: channels that hardly vary do not blow up.
EPSILON = 1e-4


@dataclass(frozen=True)
class Source:
    """Where a layer's channels can be scaled and shifted.

    Attributes:
        output: Name of what the layer computes.
        weight, bias: Names of its initializers.
        key: Of the weight in the plan.
        channels: How many.
    """

    output: str
    weight: str
    bias: str
    key: str
    channels: int


@dataclass
class _Moments:
    """Mean and variance of each channel; float32, shape (channels,)."""

    mean: Tensor
    variance: Tensor

    @staticmethod
    def of(value: Tensor) -> _Moments:
        over = [axis for axis in range(value.dim()) if axis != CHANNELS]
        mean = value.mean(over, keepdim=True)
        # torch.var_mean takes twelve times as long.
        variance = (value - mean).square_().mean(over)
        return _Moments(mean.reshape(-1), variance)


class _Layer(nn.Module):
    """Gain and shift of one layer's channels."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self.log_gain = nn.Parameter(torch.zeros(source.channels))
        self.shift = nn.Parameter(torch.zeros(source.channels))

    def affine(self, wanted: _Moments) -> tuple[Tensor, Tensor, float]:
        """Return what a normalized channel is multiplied by, what is added to it, and ``e``."""
        epsilon = EPSILON * float(wanted.variance.mean()) + torch.finfo(torch.float32).tiny
        deviation = (wanted.variance + epsilon).sqrt()
        return deviation * self.log_gain.exp(), wanted.mean + deviation * self.shift, epsilon


class Alignment(nn.Module):
    """Layers whose channels are aligned.

    Args:
        sources: The layers.
    """

    def __init__(self, sources: Iterable[Source]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(source) for source in sources)
        self._by_output = {layer.source.output: layer for layer in self}
        self._wanted: dict[str, _Moments] = {}
        self._found: dict[str, _Moments] = {}
        self.active = True

    def __iter__(self) -> Iterator[_Layer]:
        for layer in self.layers:
            assert isinstance(layer, _Layer), "made above"
            yield layer

    def __len__(self) -> int:
        return len(self.layers)

    def observe(self, name: str, value: Tensor) -> Tensor:
        """Note the moments of what the float model computes; return ``value``."""
        if self.active and name in self._by_output:
            self._wanted[name] = _Moments.of(value)
        return value

    def align(self, name: str, value: Tensor) -> Tensor:
        """Return what the rounded model computes, at the moments that were observed last."""
        if not self.active or name not in self._by_output:
            return value
        if not torch.is_grad_enabled():
            self._found[name] = _Moments.of(value)
        factor, offset, epsilon = self._by_output[name].affine(self._wanted[name])
        # Not of torch.nn.functional, which refuses one value a channel: the last batch of an epoch may be so small.
        return torch.batch_norm(value, factor, offset, None, None, True, 0.0, epsilon, False)

    @contextmanager
    def inactive(self) -> Iterator[None]:
        """Leave values alone meanwhile."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def fold(
        self, student: GraphModule, teacher: GraphModule, batches: Iterable[Mapping[str, Tensor]]
    ) -> None:
        """Put what alignment does on these batches into scales, weights and biases, for all batches alike.

        Args:
            student: Changed.
            teacher: The float model.
            batches: Inputs as they will come in use, at least one batch; all of one size, that of training.
        """
        assert student.points is not None, "the student rounds"
        wanted: dict[str, list[_Moments]] = {name: [] for name in self._by_output}
        found: dict[str, list[_Moments]] = {name: [] for name in self._by_output}
        with torch.no_grad():
            for feeds in batches:
                teacher(feeds)
                student(feeds)
                for name in self._by_output:
                    wanted[name].append(self._wanted[name])
                    found[name].append(self._found[name])
            for layer in self:
                name = layer.source.output
                _fold(layer, _pooled(wanted[name]), _pooled(found[name]), student, student.points)


def _pooled(parts: list[_Moments]) -> _Moments:
    """Return the moments of batches of equal size as those of one."""
    means = torch.stack([part.mean for part in parts])
    within = torch.stack([part.variance for part in parts]).mean(0)
    return _Moments(means.mean(0), within + means.var(0, correction=0))


def _fold(
    layer: _Layer, wanted: _Moments, found: _Moments, student: GraphModule, points: RoundingPoints
) -> None:
    factor, offset, epsilon = layer.affine(wanted)
    gain = factor / (found.variance + epsilon).sqrt()
    weight, bias = student.weight(layer.source.weight), student.weight(layer.source.bias)
    weight.mul_(gain.reshape(-1, *(1,) * (weight.dim() - 1)))
    points.weight(layer.source.key).log_scale.add_(gain.log())
    bias.copy_((bias - found.mean) * gain + offset)


def alignment_of(
    model: ir.Model, points: RoundingPoints, teacher: GraphModule, feeds: Mapping[str, Tensor]
) -> Alignment | None:
    """Return the alignment of the layers that can have it, None without any.

    These are the convolutions of 2- and 3-bit weights that have a scale for each channel and a bias.

    Args:
        model: The float model.
        points: What is rounded how.
        teacher: The float model as a module.
        feeds: A batch as it comes in training; layers that compute few values of a channel from it are left alone.
    """
    values: dict[str, int] = {}

    def count(name: str, value: Tensor) -> Tensor:
        values[name] = value.numel() // max(1, value.shape[CHANNELS]) if value.dim() > CHANNELS else 0
        return value

    before, teacher.watch = teacher.watch, count
    with torch.no_grad():
        teacher(feeds)
    teacher.watch = before
    sources = [s for s in _sources(model, points) if values[s.output] >= FEWEST_VALUES]
    return Alignment(sources) if sources else None


def _sources(model: ir.Model, points: RoundingPoints) -> Iterator[Source]:
    """Yield the layers that can be aligned: convolutions of few bits, a scale for each channel, and a bias."""
    nodes = {node_label(node): node for node in model.graph}
    keys = [d.weight for d in points.plan.nodes.values() if d.weight]
    for label, bias in points.biases.items():
        node, decision = nodes[label], points.plan.nodes[label]
        if node.op_type != "Conv" or keys.count(decision.weight) > 1 or _is_shared(node.inputs[2]):
            continue
        name, order = points.weight_names[decision.weight]
        quantizer = points.weight(decision.weight)
        if order is None and _has_channel_scales(quantizer):
            yield Source(node.outputs[0].name or "", name, bias, decision.weight, quantizer.shape[0])


def _is_shared(value: ir.Value | None) -> bool:
    return value is None or len(value.uses()) > 1


def _has_channel_scales(quantizer: WeightQuantizer) -> bool:
    quant: WeightQuant = quantizer.quant
    learns = quantizer.log_scale.requires_grad and quant.zero_point is None
    each = quant.axis == 0 and not quant.group and quantizer.log_scale.numel() == quantizer.shape[0]
    return learns and each and quant.bits <= WIDEST
