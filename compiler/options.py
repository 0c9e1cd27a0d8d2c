"""What a user asks for; one frozen record for the command line and the Python API alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from bitwright.compiler.errors import UsageError, nearest
from bitwright.compiler.tune.budget import OFF, TuneBudget
from bitwright.compiler.tune.farm import Farm
from bitwright.targets.toolchain.static_library import RESERVED_NAMES

PHASES = (
    "ingest",
    "normalize",
    "shapes",
    "plan",
    "migrate",
    "calibrate",
    "allocate",
    "quantize",
    "accuracy",
    "audit",
    "specialize",
    "tune",
)
CIRCUIT_BUDGETS = ("fps", "luts", "ffs", "dsps", "brams")
BUDGETS = ("latency", "size", "bits", "ram", "energy", "loss", *CIRCUIT_BUDGETS)
CIRCUIT_OBJECTIVES = ("interval", "luts", "ffs", "dsps", "brams")
OBJECTIVES = ("loss", "latency", "size", "ram", "energy", *CIRCUIT_OBJECTIVES)
STREAMED = ("quantized", "float")
KV_CACHES = ("float16", "int8", "int4")
LOSSES = ("sqnr", "cosine", "kl", "eval")


@dataclass(frozen=True)
class Options:
    """Options of ``compile`` and ``quantize``.

    Attributes:
        model: The ONNX file.
        target: Profile name or file.
        data: Calibration data as the command line takes it, or arrays in memory.
        validation: Samples, as the command line names them, that formats are judged by; None: calibration samples.
        output: Output folder (compile) or file (quantize).
        recipe: Name of a shipped recipe, or the path of a recipe or of a plan.yaml.
        method: Calibration method, e.g. ``"minmax"`` or ``"percentile:99.99"``; ``"judged"``: several are tried.
        samples: Calibrate on at most this many samples; None uses all.
        dims: Named dynamic dimensions -> size the artifact is compiled for.
        buckets: Named dynamic dimensions -> sizes that the artifact has functions for; inputs of other sizes are padded
            (compile only).
        pad: Input -> what fills it up to a bucket's size.
        loop: Named dynamic dimension (the batch) that the artifact serves one element at a time (compile only).
        dynamic: Named dynamic dimension (the batch, or the length of a sequence) of which the artifact serves any
            size by one function (compile only). Its buckets are sizes with functions of their own.
        longest: The largest size of ``dynamic`` that is served; None: any.
        context: Positions that the caches of a decoder hold, in one place that calls write to: the artifact then has
            functions for one new token and for pieces of a prompt (compile only); None: the model's own caches.
        static: Name of a static archive with the model, to be linked into programs (compile only).
        keep_float: Nodes that must stay in float.
        evaluate: ``FILE.py:FUNC`` metric, higher is better; or ``perplexity:TOKENS`` for a decoder.
        max_drop: Largest allowed relative drop of the metric.
        random_data: Calibrate on random data (the report shouts it).
        stop_after: Last phase to run.
        dump: Folder for a numbered model after every phase.
        threads: Threads for calibration and timing.
        golden: Samples kept in the bundle and used for verification.
        budget: Upper bounds: ``latency`` (seconds), ``size`` (bytes of constants) or ``bits`` (of a weight, on
            average), ``ram`` (bytes of activations),
            ``energy`` (joules) of one call; ``loss``: a quality bound. Of circuits: ``luts``, ``ffs``, ``dsps``,
            ``brams``, and ``fps``, the least frames a second.
        objective: What to minimise under these bounds; None: the loss, or the latency under a quality bound.
        loss: What the allocator predicts the loss by: ``sqnr``, ``cosine``, ``kl`` or ``eval``.
        scheduler: Address of a dask scheduler that sensitivities are measured on; None: processes of this machine.
        workers: Processes that sensitivities are measured with.
        group: Weights that share a scale in grouped formats; None: the recipe's.
        cache: Folder that keeps measured sensitivities for the next run.
        stream: Quantize part by part, in bounded memory (quantize only): ``quantized`` calibrates each part on what the
            quantized parts before it make, ``float`` on what the float model makes; ``off`` takes the whole model at
            once, ``auto`` streams what is larger than a quarter of the free memory.
        resume: Go on behind the parts that an interrupted streamed run with this output finished (quantize only).
        kv_cache: ``float16``, ``int8`` or ``int4``: what a decoder's cache of keys and values holds (quantize only).
        unpadded: A decoder's ``attention_mask`` holds nothing but ones, and its ``position_ids`` continue those in the
            cache: both inputs are computed, and disappear from the model.
        gate: Measure int8 against float in ONNX Runtime and keep what is faster (quantize only).
        timeout_s: Limit for lowering, or for one tool of a generator.
        steps: Optional steps of generated targets, e.g. ``synth`` and ``pnr`` (compile only).
        tune: What may be spent on measuring kernels; nothing by default: only records are used.
        tuning_store: File of tuning records; None: one in the user's cache folder.
        farm: Boards that kernels are measured on, or whose records are used; None: this machine.
    """

    model: Path
    target: str
    data: str | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]] | None = None
    validation: str | None = None
    output: Path | None = None
    recipe: str = "int8"
    method: str = "mse"
    samples: int | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    buckets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pad: Mapping[str, float] = field(default_factory=dict)
    loop: str | None = None
    dynamic: str | None = None
    longest: int | None = None
    context: int | None = None
    static: str | None = None
    keep_float: frozenset[str] = frozenset()
    evaluate: str | None = None
    max_drop: float | None = None
    random_data: bool = False
    stop_after: str | None = None
    dump: Path | None = None
    threads: int = 1
    golden: int = 2
    budget: Mapping[str, float] = field(default_factory=dict)
    objective: str | None = None
    loss: str = "sqnr"
    scheduler: str | None = None
    workers: int = 1
    group: int | None = None
    cache: Path | None = None
    stream: str = "auto"
    resume: bool = False
    kv_cache: str | None = None
    unpadded: bool = False
    gate: bool = True
    timeout_s: float = 1800.0
    steps: frozenset[str] = frozenset()
    tune: TuneBudget = OFF
    tuning_store: Path | None = None
    farm: Farm | None = None

    def __post_init__(self) -> None:
        for name in self.budget:
            _one_of(name, BUDGETS, "budget", "--budget")
        if "bits" in self.budget and "size" in self.budget:
            msg = "bits count integers alone, size the file: only one of them can be bounded"
            raise UsageError(msg, where="--budget", fix="leave one out")
        if self.objective is not None:
            _one_of(self.objective, OBJECTIVES, "objective", "--minimise")
        _one_of(self.loss, LOSSES, "loss", "--loss")
        _one_of(self.stream, ("auto", "off", *STREAMED), "way", "--stream")
        if self.kv_cache is not None:
            _one_of(self.kv_cache, KV_CACHES, "type of a cache", "--kv-cache")
        if self.stop_after is not None:
            _one_of(self.stop_after, PHASES, "phase", "--stop-after")
        if self.max_drop is not None and self.evaluate is None:
            msg = "a drop of which metric?"
            raise UsageError(msg, where="--max-drop", fix="name one with --eval FILE.py:FUNC")
        if self.data is None and not self.random_data:
            msg = "activation ranges must be learned from real data"
            raise UsageError(
                msg,
                where="--data",
                fix="pass an .npz, a folder of .npz files, FILE.py:FUNC or, for a decoder, tokens or a text (or "
                "--random-data, for a dry try only)",
            )
        if self.samples is not None and self.samples < 1:
            msg = "at least one sample is needed"
            raise UsageError(msg, where="--samples", fix="pass 1 or more")
        if self.loss == "eval" and self.evaluate is None:
            msg = "the loss 'eval' needs a metric"
            raise UsageError(msg, where="--loss", fix="name one with --eval FILE.py:FUNC")
        self._check_shapes()
        if self.context is not None:
            self._check_context(self.context)

    def _check_context(self, context: int) -> None:
        if context < 2:
            msg = f"caches of {context} positions hold no text"
            raise UsageError(msg, where="--context", fix="e.g. --context 256")
        for given, name in (
            (self.dims, "--dim"),
            (self.loop, "--loop"),
            (self.dynamic, "--dynamic"),
            (self.evaluate, "--eval"),
        ):
            if given:
                msg = f"a decoder with caches of fixed capacity takes no {name}"
                fix = (
                    "measure with `bitwright quantize`"
                    if name == "--eval"
                    else "--bucket T=1,8,32 names sizes of calls"
                )
                raise UsageError(msg, where=name, fix=fix)

    def _check_dynamic(self, name: str) -> None:
        if self.longest is not None and self.longest < 1:
            msg = f"{self.longest} is no size"
            raise UsageError(msg, where="--dynamic", fix=f"e.g. --dynamic {name}=512")
        if name in self.dims:
            msg = f"dimension '{name}' is named by --dim and by --dynamic"
            raise UsageError(msg, where="--dynamic", fix="leave one out")
        if self.loop is not None:
            msg = f"'{self.loop}' is served one element at a time, '{name}' in any number"
            raise UsageError(msg, where="--dynamic", fix="leave --loop or --dynamic out")

    def _check_shapes(self) -> None:
        for name, sizes in self.buckets.items():
            if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
                msg = f"the buckets of '{name}' are no ascending positive sizes"
                raise UsageError(msg, where="--bucket", fix=f"e.g. --bucket {name}=16,32,64")
        looped = {self.loop} if self.loop is not None else set()
        ways = [(set(self.dims), "--dim"), (set(self.buckets), "--bucket"), (looped, "--loop")]
        if self.dynamic is not None:
            self._check_dynamic(self.dynamic)
        elif self.longest is not None:
            msg = "the largest size of which dimension?"
            raise UsageError(msg, where="--dynamic", fix="name it, e.g. --dynamic T=512")
        for (first, one), (second, other) in combinations(ways, 2):
            for name in sorted(first & second):
                msg = f"dimension '{name}' is named by {one} and by {other}"
                raise UsageError(msg, where=other, fix="leave one out")
        if self.static is not None:
            _check_archive_name(self.static)
        if self.pad and not set(self.buckets) - {self.dynamic}:
            msg = "only inputs of a model with buckets are padded"
            raise UsageError(msg, where="--pad", fix="name the buckets, e.g. --bucket T=16,32,64")


def _check_archive_name(name: str) -> None:
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]{0,63}", name):
        msg = f"'{name}' is no name for C"
        raise UsageError(
            msg, where="--static", fix="use letters, digits and underscores, e.g. --static model"
        )
    if name in RESERVED_NAMES:
        msg = f"'{name}' is a word of C and C++, or the name of something that programs link already"
        raise UsageError(msg, where="--static", fix=f"e.g. --static {name}_model")


def _one_of(value: str, known: tuple[str, ...], what: str, option: str) -> None:
    if value not in known:
        msg = f"unknown {what} '{value}'"
        raise UsageError(msg, where=option, fix=nearest(value, known))
