"""What is minimized: how far the rounded model's outputs are from the float model's, and from labels if there are any.

The float model's probabilities say more about an input than a label does (Hinton et al. 2015, "Distilling the
Knowledge in a Neural Network"), and any input has them: no labels are needed, and mixed or generated inputs teach, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from bitwright.compiler.errors import DataError, ModelError
from bitwright.compiler.graph.model import is_op
from bitwright.compiler.plan.units import Unit

LossName = Literal["kl", "mse"]


def hidden_values(units: Iterable[Unit], outputs: Collection[str]) -> tuple[str, ...]:
    """Return what the units compute that is no output: the values that hidden layers are compared by.

    Args:
        units: Of the float model; those that only move data compute nothing.
        outputs: The graph's outputs and those that are compared.
    """
    found = dict.fromkeys(u.output.name or "" for u in units if u.role != "carrier")
    return tuple(name for name in found if name not in outputs)


def compared_values(model: ir.Model, loss: LossName) -> tuple[str, ...]:
    """Return the values that student and teacher are compared by.

    Args:
        model: The float model.
        loss: ``kl``: the first output, or what goes into it if it is a Softmax's. ``mse``: every float output.

    Raises:
        ModelError: There is no float output.
    """
    floats = [o for o in model.graph.outputs if o.dtype in (None, ir.DataType.FLOAT)]
    if not floats:
        what = "no output is a float tensor, so nothing can be compared"
        raise ModelError(
            what, where=model.graph.name or "model", fix="export the model without its last step"
        )
    if loss == "mse":
        return tuple(o.name or "" for o in floats)
    maker = floats[0].producer()
    if maker is not None and is_op(maker, "Softmax", "LogSoftmax") and maker.inputs[0] is not None:
        return (maker.inputs[0].name or "",)
    return (floats[0].name or "",)


@dataclass(frozen=True)
class Distillation:
    """The loss of a batch.

    Attributes:
        loss: ``kl``: Kullback-Leibler divergence between distributions over the last axis. ``mse``: squared
            difference in shares of the teacher's mean square.
        temperature: Logits are divided by it; above 1 unlikely classes count more.
        label_share: Share of the cross entropy with the labels, where there are any.
        hidden: Weight of the hidden layers: of the mean, over them, of squared differences in shares of the teacher's
            mean square (Romero et al. 2015, "FitNets", section 2.2, without their regressor: both have the same
            layers). A sample's outputs are a handful of numbers, its hidden layers are thousands: where samples are
            few, they keep training from learning these by heart.
        layers: Names of the hidden values.
    """

    loss: LossName = "kl"
    temperature: float = 1.0
    label_share: float = 0.5
    hidden: float = 0.0
    layers: tuple[str, ...] = ()

    def __call__(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], labels: Tensor | None
    ) -> Tensor:
        """Return the loss that is minimized, a scalar."""
        found = self.judged(student, teacher, labels)
        if not self.hidden or not self.layers:
            return found
        between = [_relative(student[name], teacher[name]) for name in self.layers]
        return found + self.hidden * torch.stack(between).mean()

    def judged(self, student: dict[str, Tensor], teacher: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        """Return the part of the loss that says how good a model is, a scalar: of the outputs alone."""
        pairs = [(student[name], teacher[name]) for name in teacher if name not in self.layers]
        if self.loss == "mse":
            return torch.stack([_relative(s, t) for s, t in pairs]).mean()
        found = torch.stack([self._divergence(s, t) for s, t in pairs]).mean()
        if labels is None or not self.label_share:
            return found
        entropy = _cross_entropy(pairs[0][0], labels)
        return (1 - self.label_share) * found + self.label_share * entropy

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean divergence a row, times the temperature squared, which keeps gradients' size."""
        logs = functional.log_softmax(student / self.temperature, dim=-1)
        wanted = functional.log_softmax(teacher / self.temperature, dim=-1)
        rows = max(1, student.numel() // student.shape[-1])
        return functional.kl_div(logs, wanted, reduction="sum", log_target=True) / rows * self.temperature**2


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-12)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.shape != logits.shape[:-1] or int(labels.max()) >= logits.shape[-1] or int(labels.min()) < 0:
        what = (
            f"labels of shape {list(labels.shape)} from {int(labels.min())} to {int(labels.max())} do not fit "
            f"outputs of shape {list(logits.shape)}"
        )
        raise DataError(what, where="--labels", fix="give the class of every sample, counted from 0")
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
