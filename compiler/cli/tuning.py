"""``tune``, and the options by which ``compile`` tunes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitwright.compiler.cli import arguments as arg
from bitwright.compiler.cli.output import Output
from bitwright.compiler.cli.parsing import check_place
from bitwright.compiler.cli.progress import TerminalProgress
from bitwright.compiler.cli.quantization import Quantization
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.report.figures import DASH, seconds_text
from bitwright.compiler.tune.budget import parse_budget
from bitwright.compiler.tune.farm import parse_farm

if TYPE_CHECKING:
    from bitwright.compiler.tune.outcome import TunedKernel, Tuning

PANEL = "Tuning"


@dataclass(frozen=True)
class TuningPlaces:
    """Where kernels are measured and where that is remembered, as it is written on the command line."""

    tuning_store: Annotated[
        Path | None,
        typer.Option(
            "--tuning-store",
            metavar="FILE",
            help="Records of measured kernels; in the user's cache folder unless named.",
            rich_help_panel=PANEL,
        ),
    ] = None
    tracker: Annotated[
        str | None,
        typer.Option(
            "--tracker",
            metavar="HOST:PORT",
            help="Measure on boards behind this TVM RPC tracker.",
            rich_help_panel=PANEL,
        ),
    ] = None
    device_key: Annotated[
        str | None,
        typer.Option(
            "--device-key",
            metavar="KEY",
            help="What these boards' servers call themselves; without a tracker: use their records.",
            rich_help_panel=PANEL,
        ),
    ] = None

    def values(self) -> dict[str, Any]:
        """Return the fields of :class:`~bitwright.compiler.options.Options`.

        Raises:
            UsageError: A value is not written as it should be, or the store has no place.
        """
        if self.tuning_store is not None:
            check_place(self.tuning_store, "--tuning-store")
            if self.tuning_store.is_dir():
                msg = "is a folder"
                raise UsageError(msg, where=f"--tuning-store {self.tuning_store}", fix="name a file")
        return {"tuning_store": self.tuning_store, "farm": parse_farm(self.tracker, self.device_key)}


Tune = Annotated[
    str,
    typer.Option(
        "--tune",
        metavar="BUDGET",
        help="Measure kernels: 60s, 5m or 200 (trials) at most; off: only use records.",
        rich_help_panel=PANEL,
    ),
]


def tune_verb(
    out: Output,
    model: arg.Model,
    target: arg.Target,
    quantization: Quantization,
    places: TuningPlaces,
    tune: Tune = "60s",
) -> None:
    """Measure ways to compute a model's dot products and remember the fastest for every compilation."""
    from bitwright.compiler.pipeline import tune_model

    values = {**quantization.values(), **places.values(), "tune": parse_budget(tune)}
    options = Options(model=model, target=target, **values)
    with TerminalProgress(out) as progress:
        found = tune_model(options, progress)
    print_tuning(out, found)
    if out.json:
        out.document(found.as_plain())
    else:
        out.path(found.store)


def print_tuning(out: Output, found: Tuning) -> None:
    """Print what tuning came to, a row for each workload."""
    out.warn(found.notes)
    columns = ("Work", "#Calls", "#Default", "#Chosen", "#Ratio", "#Trials", "Kernel")
    out.table(f"Kernels, timed on {found.hardware.split(' | ')[1]}", columns, map(_row, found.kernels))
    gain = f"; time of all kernels {found.ratio:.2f} of the defaults'" if found.ratio is not None else ""
    spent = (
        f"{found.trials} kernels measured ({found.executed}) in {found.seconds:.1f} s"
        if found.trials
        else "nothing was measured: everything that matters is in the store"
    )
    out.say(f"{spent}{gain}")


def _row(kernel: TunedKernel) -> tuple[str, ...]:
    record = kernel.record
    if record is None:
        return kernel.workload.label, str(kernel.workload.calls), DASH, DASH, DASH, DASH, "default"
    return (
        kernel.workload.label,
        str(kernel.workload.calls),
        seconds_text(record.default_s),
        seconds_text(record.default_s * min(1.0, record.ratio)),
        f"{min(1.0, record.ratio):.2f}",
        str(record.trials or DASH),
        "default" if kernel.choice is None else kernel.choice.label(),
    )
