"""What a user asks of training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitwright.compiler.errors import UsageError, nearest

SCALINGS: tuple[str, ...] = ("learned", "mean")
LOSSES: tuple[str, ...] = ("kl", "mse")
FEW = ("ternary", "binary")
FEWEST, MOST = 2, 8


@dataclass(frozen=True)
class Precision:
    """The width that is asked for.

    Attributes:
        weights: Bits, or ``"ternary"`` or ``"binary"``; None: what the recipe says.
        activations: Bits of what narrowed layers read; None: what the recipe says.
        everywhere: The first and the last layer are narrowed, too.
    """

    weights: int | str | None = None
    activations: int | None = None
    everywhere: bool = False

    def __post_init__(self) -> None:
        weights, activations = self.weights, self.activations
        fits = weights in FEW if isinstance(weights, str) else weights is None or FEWEST <= weights <= MOST
        fix = f"pass {FEWEST} to {MOST} bits, ternary or binary"
        _check(fits, f"'{weights}' is no width that can be trained", "--weights", fix)
        fits = activations is None or 1 <= activations <= MOST
        _check(
            fits, f"{activations} is no width that can be trained", "--activations", f"pass 1 to {MOST} bits"
        )


@dataclass(frozen=True)
class Training:
    """Options of ``train`` beside those of every verb that quantizes.

    Attributes:
        precision: Narrower weights and activations than the recipe's.
        runtime: Which of the target's runtimes the model is rounded for.
        epochs: Times that every sample is seen.
        minutes: Bound on the time of the loop; None: none.
        batch: Samples of a step.
        rate: Largest step of the weights.
        scale_rate: The same of the logarithms of scales.
        seed: Equal seeds give equal models.
        labels: File of labels, or None.
        label_share: Share of the labels in the loss, 0 to 1.
        loss: ``kl`` for logits and probabilities, ``mse`` for other outputs.
        temperature: Of the distillation.
        hidden: Weight of the hidden layers' differences in the loss, beside that of the outputs; 0: outputs alone.
        scaling: Scales of two or three values: ``learned``, or ``mean``, the mean magnitude of the weights.
        align: Convolutions of 2- and 3-bit weights are held at the float model's means and variances at first.
        mixture: Share of the batches that are mixtures of two samples each.
        held: Share of the samples that judge and are not trained on.
        save_every: Steps between checkpoints.
        resume: Go on from the checkpoint beside the output.
    """

    precision: Precision = field(default_factory=Precision)
    runtime: Literal["artifact", "onnxruntime"] = "artifact"
    epochs: float = 10.0
    minutes: float | None = None
    batch: int = 32
    rate: float = 1e-3
    scale_rate: float = 1e-2
    seed: int = 0
    labels: Path | None = None
    label_share: float = 0.5
    loss: Literal["kl", "mse"] = "kl"
    temperature: float = 1.0
    hidden: float = 0.0
    scaling: Literal["learned", "mean"] = "learned"
    align: bool = True
    mixture: float = 0.0
    held: float = 0.1
    save_every: int = 100
    resume: bool = False

    def __post_init__(self) -> None:
        positive = {"--epochs": self.epochs, "--batch": self.batch, "--rate": self.rate}
        positive |= {"--scale-rate": self.scale_rate, "--temperature": self.temperature}
        positive |= {"--save-every": self.save_every}
        positive |= {} if self.minutes is None else {"--minutes": self.minutes}
        for option, value in positive.items():
            if not 0 < value < float("inf"):
                what = f"{value:g} is not positive"
                raise UsageError(what, where=option, fix="pass a positive number")
        _check(0 <= self.hidden < float("inf"), f"{self.hidden:g} is no weight", "--hidden", "pass 0 or more")
        for option, share in {"--mix": self.mixture, "--label-share": self.label_share}.items():
            _check(0 <= share <= 1, f"{share:g} is no share", option, "pass 0 to 1")
        _check(0 < self.held < 1, f"{self.held:g} is no share", "--hold", "pass more than 0, less than 1")
        _check(self.seed >= 0, f"{self.seed} is no seed", "--seed", "pass 0 or more")
        for option, name, known in (("--scaling", self.scaling, SCALINGS), ("--loss", self.loss, LOSSES)):
            _check(name in known, f"there is no '{name}'", option, nearest(name, known))

    def settings(self) -> dict[str, Any]:
        """Return what a checkpoint must have been made with, as JSON values."""
        found = asdict(self)
        for name in ("resume", "save_every"):
            del found[name]
        return {**found, "labels": None if self.labels is None else str(self.labels)}


def checkpoint_of(output: Path) -> Path:
    """Return the checkpoint's place beside the model."""
    return output.with_name(f"{output.name.removesuffix('.onnx')}.checkpoint.npz")


def _check(holds: bool, what: str, option: str, fix: str) -> None:
    if not holds:
        raise UsageError(what, where=option, fix=fix)
