"""The state that travels through the phases of one compilation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from bitwright.compiler.errors import UsageError
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.options import Options
from bitwright.compiler.plan.model import Plan
from bitwright.compiler.plan.selection import Selection
from bitwright.compiler.plan.units import FormatChoice
from bitwright.compiler.recipe.loader import LoadedRecipe, load_recipe
from bitwright.targets.schema import FOLDED_FAMILIES, GENERATED_FAMILIES, Profile

if TYPE_CHECKING:
    from bitwright.compiler.allocate.solve import Allocation
    from bitwright.compiler.bundle.runtime import ShippedFile
    from bitwright.compiler.bundle.verification import Verification
    from bitwright.compiler.calibrate.statistics import TensorStatistics
    from bitwright.compiler.ingest.dataset import Dataset
    from bitwright.compiler.ingest.model_reader import SourceModel
    from bitwright.compiler.lower.job import LoweringResult
    from bitwright.compiler.ort.accuracy import Accuracy
    from bitwright.compiler.ort.audit import Audit
    from bitwright.compiler.ort.no_regret import GateResult
    from bitwright.compiler.ort.timing import PairedTiming
    from bitwright.compiler.ort.what_if import WhatIf
    from bitwright.compiler.tune.outcome import Tuning
    from bitwright.passes.block_tables import TiedTable
    from bitwright.targets.backend import KernelChoice
    from bitwright.targets.folding import FoldingValues
    from bitwright.targets.generator import Generated
    from bitwright.targets.toolchain.shape_rules import CacheRule, ShapeRules

Feeds = Mapping[str, np.ndarray]


class Progress(Protocol):
    """Where phases tell how far they are."""

    def phase(self, name: str) -> None:
        """A phase begins."""
        ...

    def step(self, done: int, total: int, what: str) -> None:
        """Work inside the phase."""
        ...

    def note(self, text: str) -> None:
        """Something that a reader wants to know before the phase is over."""
        ...


class Silent:
    """Reports nothing."""

    def phase(self, name: str) -> None:
        """A phase begins."""

    def step(self, done: int, total: int, what: str) -> None:
        """Work inside the phase."""

    def note(self, text: str) -> None:
        """Something that a reader wants to know before the phase is over."""


@dataclass
class PhaseRecord:
    """What a phase did, for the report."""

    name: str
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """Another format for one layer.

    Attributes:
        format: The format.
        gain_db: What the outputs were measured to gain by it, every weight rounded to nearest.
    """

    format: str
    gain_db: float


@dataclass
class Compilation:
    """Everything known so far; each phase reads what earlier ones wrote.

    Attributes:
        options: What the user asked for.
        profile: The target.
        progress: Where to report.
        recipe: How to quantize; read from the options.
        source: The model as it was read; without the inputs for mask and positions if nobody is said to be padded.
        masked: The model with these inputs, or None if it has not lost any, or has been proven to compute the same.
        normalized: The normalized float model, before anything was migrated.
        model: The float model that is quantized: normalized, scales migrated.
        moments: What the data says about the inputs of weighted operators, by node.
        formats: Which formats the nodes may run in.
        migrations: What each rewrite of the migration did.
        migrated: How many changes each of them made.
        dataset: Calibration samples.
        validation: Samples that formats are judged by, if the user has any for that.
        selection: What runs on integers.
        statistics: By tensor name.
        allocation: What the allocator chose and why, if there was a choice.
        plan: Every decision.
        tied: Tables in other parts of the model, of which this is one, that products here may read.
        quantized: The Q/DQ model.
        sqnr_db: Noise of every layer's output and of the model's outputs, everything before it quantized, too.
        own_db: Noise that each layer adds to exact inputs, by the tensor it writes.
        advice: What the worst layers cost the outputs.
        changes: The change of the plan that helps such a layer most.
        audit: What ONNX Runtime made of ``quantized``.
        accuracy: The user's metric before and after.
        timing: Quantized against float in ONNX Runtime.
        gate: The no-regret gate's verdict (ONNX Runtime deployment only).
        dims: Sizes of the dynamic dimensions that are planned (and compiled) for.
        shapes: Static shape of every tensor at those sizes.
        cache: Caches of fixed capacity that a decoder's artifact writes to, or None.
        rules: The artifact's shapes and how inputs are padded to them, if it has several.
        static: The Q/DQ model at those sizes.
        golden: Samples of those sizes.
        tuning: Which kernels were chosen by measuring.
        lowering: Objects and kernel table.
        foldings: How much of each layer of a circuit is computed in a cycle.
        generated: What a family that lowers nothing by TVM wrote instead.
        shipped: Files of the artifact that a program needs at run time.
        verification: The executed artifact against the reference.
        float_s: Best wall seconds of the float model in ONNX Runtime on a golden sample, on this machine.
        phases: Record of what ran.
    """

    options: Options
    profile: Profile
    progress: Progress = field(default_factory=Silent)
    recipe: LoadedRecipe = field(init=False)
    source: SourceModel | None = None
    masked: ir.Model | None = None
    normalized: ir.Model | None = None
    model: ir.Model | None = None
    dataset: Dataset | None = None
    validation: Dataset | None = None
    selection: Selection | None = None
    statistics: dict[str, TensorStatistics] = field(default_factory=dict)
    moments: dict[str, InputMoments] = field(default_factory=dict)
    formats: FormatChoice = field(default_factory=FormatChoice)
    migrations: dict[str, tuple[str, ...]] = field(default_factory=dict)
    migrated: dict[str, int] = field(default_factory=dict)
    allocation: Allocation | None = None
    plan: Plan | None = None
    tied: tuple[TiedTable, ...] = ()
    quantized: ir.Model | None = None
    sqnr_db: dict[str, float] = field(default_factory=dict)
    own_db: dict[str, float] = field(default_factory=dict)
    advice: tuple[WhatIf, ...] = ()
    changes: dict[str, Change] = field(default_factory=dict)
    audit: Audit | None = None
    accuracy: Accuracy | None = None
    timing: PairedTiming | None = None
    gate: GateResult | None = None
    dims: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    cache: CacheRule | None = None
    rules: ShapeRules | None = None
    static: ir.Model | None = None
    golden: list[dict[str, np.ndarray]] = field(default_factory=list)
    tuning: Tuning | None = None
    lowering: LoweringResult | None = None
    foldings: dict[str, FoldingValues] = field(default_factory=dict)
    generated: Generated | None = None
    shipped: tuple[ShippedFile, ...] = ()
    verification: Verification | None = None
    float_s: float | None = None
    phases: list[PhaseRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe = load_recipe(self.options.recipe)

    @property
    def allocates(self) -> bool:
        """Whether formats are to be chosen: the recipe says so, or the user or the profile sets a budget."""
        if self.profile.family in FOLDED_FAMILIES:  # budgets bound the foldings, whatever the formats
            return self.recipe.recipe.choose == "allocate"
        default = self.profile.budgets
        limits = (default.latency_s, default.weights_bytes, default.peak_ram_bytes)
        return self.recipe.recipe.choose == "allocate" or bool(self.options.budget) or any(limits)

    def refuse_unused_options(self) -> None:
        """Refuse what only measuring sensitivities would use where no formats are to be chosen.

        Raises:
            UsageError: ``--scheduler``, or ``--cache`` for a family that has no other use for it.
        """
        if self.allocates:
            return
        cache = None if self.profile.family in GENERATED_FAMILIES else self.options.cache
        for value, name in ((self.options.scheduler, "--scheduler"), (cache, "--cache")):
            if value is not None:
                msg = (
                    f"recipe '{self.recipe.recipe.name}' chooses no formats, so no sensitivities are measured"
                )
                fix = f"leave {name} out, or let formats be chosen: --recipe mixed, or a --budget"
                raise UsageError(msg, where=name, fix=fix)

    @property
    def choices(self) -> dict[str, KernelChoice]:
        """Kernels that tuning chose, by workload; every other is the template's default."""
        return {} if self.tuning is None else self.tuning.choices

    @contextmanager
    def recorded(self, name: str) -> Iterator[list[str]]:
        """Time a phase; lines added to the yielded list become its notes.

        Linear algebra uses as many threads as ONNX Runtime: on few cores the waiting threads of OpenBLAS take the time
        of the working ones, five times as much in all.
        """
        self.progress.phase(name)
        notes: list[str] = []
        start = time.perf_counter()
        with threadpool_limits(self.options.threads, user_api="blas"):
            yield notes
        self.phases.append(PhaseRecord(name, time.perf_counter() - start, tuple(notes)))


Phase = Callable[[Compilation, list[str]], None]
