"""``train``: quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place, parse_dims
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.training.entry import train
from bitwright.compiler.training.request import Precision, Training, checkpoint_of

if TYPE_CHECKING:
    from bitwright.compiler.training.train import Trained

OBJECTIVE = "What is minimized"
LENGTH = "How long and how fast"


@dataclass(frozen=True)
class Widths:
    """Fewer bits than the recipe gives."""

    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="BITS", help="Weights of inner layers: 2 to 8, ternary or binary."),
    ] = None
    activations: Annotated[
        int | None,
        typer.Option("--activations", metavar="BITS", help="What these layers read: 1 to 8 bits."),
    ] = None
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="The first and the last layer get fewer bits, too.")
    ] = False
    scaling: Annotated[
        str,
        typer.Option("--scaling", help="Scales of ternary and binary weights: learned, or mean (BitNet)."),
    ] = "learned"

    def precision(self) -> Precision:
        """Return the widths as training takes them."""
        text = self.weights
        bits = int(text) if text is not None and text.isascii() and text.isdigit() else text
        return Precision(bits, self.activations, self.all_layers)


@dataclass(frozen=True)
class Objective:
    """What is minimized."""

    loss: Annotated[
        str,
        typer.Option(
            "--loss",
            rich_help_panel=OBJECTIVE,
            help="Distance to the float model: kl for classes and tokens, mse for other outputs.",
        ),
    ] = "kl"
    temperature: Annotated[
        float, typer.Option("--temperature", rich_help_panel=OBJECTIVE, help="Of the distillation.")
    ] = 1.0
    hidden: Annotated[
        float,
        typer.Option(
            "--hidden",
            rich_help_panel=OBJECTIVE,
            help="Weight of the hidden layers' differences, beside the outputs'.",
        ),
    ] = 0.0
    align: Annotated[
        bool,
        typer.Option(
            "--align/--no-align",
            rich_help_panel=OBJECTIVE,
            help="Hold convolutions of 2- and 3-bit weights at the float model's means and variances at first.",
        ),
    ] = True
    labels: Annotated[
        Path | None,
        typer.Option("--labels", rich_help_panel=OBJECTIVE, metavar="FILE.npz", help="Classes, if known."),
    ] = None
    label_share: Annotated[
        float,
        typer.Option("--label-share", rich_help_panel=OBJECTIVE, help="Share of the labels in the loss."),
    ] = 0.5
    mix: Annotated[
        float,
        typer.Option("--mix", rich_help_panel=OBJECTIVE, help="Share of batches that mix two samples each."),
    ] = 0.0
    hold: Annotated[
        float,
        typer.Option("--hold", rich_help_panel=OBJECTIVE, help="Share of --data that only judges."),
    ] = 0.1


@dataclass(frozen=True)
class Length:
    """How long and how fast."""

    epochs: Annotated[
        float, typer.Option("--epochs", rich_help_panel=LENGTH, help="Times that every sample is seen.")
    ] = 10.0
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", rich_help_panel=LENGTH, help="Steps: at most as many as this time allows."),
    ] = None
    batch: Annotated[int, typer.Option("--batch", rich_help_panel=LENGTH, help="Samples of a step.")] = 32
    rate: Annotated[float, typer.Option("--rate", rich_help_panel=LENGTH, help="Of weights (Adam).")] = 1e-3
    scale_rate: Annotated[
        float, typer.Option("--scale-rate", rich_help_panel=LENGTH, help="Of the logarithms of scales.")
    ] = 1e-2
    seed: Annotated[
        int, typer.Option("--seed", rich_help_panel=LENGTH, help="Equal seeds give equal models.")
    ] = 0
    save_every: Annotated[
        int, typer.Option("--save-every", rich_help_panel=LENGTH, help="Steps between checkpoints.")
    ] = 100
    resume: Annotated[
        bool,
        typer.Option("--resume", rich_help_panel=LENGTH, help="Go on from the checkpoint beside the output."),
    ] = False


def train_verb(
    out: Output,
    model: arg.Model,
    target: arg.Target,
    widths: Widths,
    objective: Objective,
    length: Length,
    data: arg.Data = None,
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation", help="Samples that only judge, in place of a share of --data.", metavar="DATA"
        ),
    ] = None,
    recipe: arg.Recipe = "int8",
    method: arg.Method = "mse",
    dim: arg.Dims = None,
    keep_float: arg.KeepFloat = None,
    group: arg.Group = None,
    runtime: Annotated[
        Literal["artifact", "onnxruntime"], typer.Option("--for", help="Where the trained model is to run.")
    ] = "artifact",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write; MODEL.trained.onnx unless named."),
    ] = None,
    threads: arg.ComputingThreads = 1,
) -> None:
    """Train a model as it will be rounded, and write it as a Q/DQ model that the other verbs take as it is."""
    place = output or model.with_name(f"{model.name.removesuffix('.onnx')}.trained.onnx")
    _check_place(model, place)
    training = _training(widths, objective, length, runtime)
    options = Options(
        model,
        target,
        data,
        output=place,
        recipe=recipe,
        method=method,
        dims=parse_dims(dim or ()),
        keep_float=frozenset(keep_float or ()),
        group=group,
        threads=threads,
        validation=validation,
    )
    try:
        with TerminalProgress(out) as progress:
            trained = train(options, training, progress)
    except KeyboardInterrupt:
        if checkpoint_of(place).is_file():
            out.say(f"{checkpoint_of(place)} holds what was reached: the same command with --resume goes on")
        raise
    _print(out, trained)


def _training(widths: Widths, objective: Objective, length: Length, runtime: arg.RuntimeName) -> Training:
    return Training(
        widths.precision(),
        runtime,
        length.epochs,
        length.minutes,
        length.batch,
        length.rate,
        length.scale_rate,
        length.seed,
        objective.labels,
        objective.label_share,
        objective.loss,  # type: ignore[arg-type]
        objective.temperature,
        objective.hidden,
        widths.scaling,  # type: ignore[arg-type]
        objective.align,
        objective.mix,
        objective.hold,
        length.save_every,
        length.resume,
    )


def _check_place(model: Path, place: Path) -> None:
    where = f"--output {place}"
    if place.suffix != ".onnx":
        what = "the file's name must end in .onnx"
        raise UsageError(what, where=where, fix=f"write {place.with_suffix('.onnx').name}")
    check_place(place, "--output")
    if place.exists() and model.exists() and place.samefile(model):
        what = "would overwrite the model itself"
        raise UsageError(what, where=where, fix="choose another name")


def _print(out: Output, trained: Trained) -> None:
    done = trained.outcome
    out.say(
        f"{done.steps} steps; held-out loss {done.first_loss:.4g} at first, {done.best_loss:.4g} at best "
        f"(step {done.best_step})"
    )
    if out.json:
        out.document(trained.to_dict())
        return
    for path in (trained.model, trained.plan):
        out.path(path)
