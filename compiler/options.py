"""What a user asks for; one frozen record for the command line and the Python API alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bitwright.compiler.errors import UsageError, nearest

PHASES = (
    "ingest",
    "normalize",
    "shapes",
    "plan",
    "calibrate",
    "allocate",
    "quantize",
    "audit",
    "specialize",
)
RECIPES = ("int8",)


@dataclass(frozen=True)
class Options:
    """Options of ``compile`` and ``quantize``.

    Attributes:
        model: The ONNX file.
        target: Profile name or file.
        data: Calibration data as the command line takes it, or arrays in memory.
        output: Output folder (compile) or file (quantize).
        recipe: Quantization recipe.
        method: Calibration method, e.g. ``"minmax"`` or ``"percentile:99.99"``.
        samples: Calibrate on at most this many samples; None uses all.
        dims: Named dynamic dimensions -> size the artifact is compiled for.
        keep_float: Nodes that must stay in float.
        evaluate: ``FILE.py:FUNC`` metric, higher is better.
        max_drop: Largest allowed relative drop of the metric.
        random_data: Calibrate on random data (the report shouts it).
        stop_after: Last phase to run.
        dump: Folder for a numbered model after every phase.
        threads: Threads for calibration and timing.
        golden: Samples kept in the bundle and used for verification.
        gate: Measure int8 against float in ONNX Runtime and keep what is faster (quantize only).
        timeout_s: Limit for lowering.
    """

    model: Path
    target: str
    data: str | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]] | None = None
    output: Path | None = None
    recipe: str = "int8"
    method: str = "mse"
    samples: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    keep_float: frozenset[str] = frozenset()
    evaluate: str | None = None
    max_drop: float | None = None
    random_data: bool = False
    stop_after: str | None = None
    dump: Path | None = None
    threads: int = 1
    golden: int = 2
    gate: bool = True
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            msg = f"unknown recipe '{self.recipe}'"
            raise UsageError(msg, where="--recipe", fix=nearest(self.recipe, RECIPES))
        if self.stop_after is not None and self.stop_after not in PHASES:
            msg = f"unknown phase '{self.stop_after}'"
            raise UsageError(msg, where="--stop-after", fix=nearest(self.stop_after, PHASES))
        if self.max_drop is not None and self.evaluate is None:
            msg = "a drop of which metric?"
            raise UsageError(msg, where="--max-drop", fix="name one with --eval FILE.py:FUNC")
        if self.data is None and not self.random_data:
            msg = "activation ranges must be learned from real data"
            raise UsageError(
                msg,
                where="--data",
                fix="pass an .npz, a folder of .npz files or FILE.py:FUNC (or --random-data, for a dry try only)",
            )
        if self.samples is not None and self.samples < 1:
            msg = "at least one sample is needed"
            raise UsageError(msg, where="--samples", fix="pass 1 or more")
