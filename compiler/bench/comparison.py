"""``bench``: two models in ONNX Runtime, or a bundle's artifact against a model, each in processes of its own."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitwright.compiler.bench.entry import Entry
from bitwright.compiler.bench.models import (
    GivenModel,
    check_same_inputs,
    float_model_of,
    open_given,
    sample_for,
)
from bitwright.compiler.bench.quiet import Surroundings, surroundings
from bitwright.compiler.bench.statistics import Interval
from bitwright.compiler.bench.turns import ROUNDS, SESSIONS, TURN_S, Turns, take_turns
from bitwright.compiler.bundle.golden import write_npz
from bitwright.compiler.compilation import Progress, Silent
from bitwright.compiler.errors import UsageError
from bitwright.targets.toolchain.linker import is_native

FLOAT, OWN = "fp32", "int8"
CLOCKS = {"thread": "processor time of the calling thread", "wall": "wall time"}


@dataclass(frozen=True)
class BenchResult:
    """Two ways of running a model, timed.

    Attributes:
        first: Label of the candidate.
        second: Label of the reference.
        ratio: Median time of the first over median time of the second, with its 95 % interval.
        first_s: Median seconds of one call of the first.
        second_s: Median seconds of one call of the second.
        first_best_s: Smallest seconds of one call of the first.
        second_best_s: Smallest seconds of one call of the second.
        threads: Threads that computed.
        clock: What the seconds are.
        sessions: How often both processes were started.
        rounds: Turns of every process.
        surroundings: What else the machine did.
        data: What the inputs are.
        notes: How each was run.
        warnings: What a reader of the figures must know.
    """

    first: str
    second: str
    ratio: Interval
    first_s: float
    second_s: float
    first_best_s: float
    second_best_s: float
    threads: int
    clock: str
    sessions: int
    rounds: int
    surroundings: Surroundings
    data: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def verdict(self) -> str:
        """Return what the interval says."""
        r = self.ratio
        span = f"{r.value:.3f} ({r.low:.3f} to {r.high:.3f})"
        if not r.shows_difference:
            return f"no difference shown: {self.first} takes {span} of the time of {self.second}"
        word = "faster" if r.high < 1 else "slower"
        return f"{self.first} is {word}: it takes {span} of the time of {self.second}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; ``ratio`` is the number, ``interval`` its ends."""
        interval = [self.ratio.low, self.ratio.high]
        return {
            **asdict(self),
            "ratio": self.ratio.value,
            "interval": interval,
            "difference_shown": self.ratio.shows_difference,
        }


def bench(
    first: str | Path,
    second: str | Path | None = None,
    *,
    data: str | None = None,
    threads: int = 1,
    rounds: int = ROUNDS,
    sessions: int = SESSIONS,
    turn_s: float = TURN_S,
    progress: Progress | None = None,
) -> BenchResult:
    """Time two models in ONNX Runtime, or the artifact of a bundle against one.

    Args:
        first: An .onnx file, or a bundle: the candidate.
        second: The reference: an .onnx file or a bundle; ``"int8"`` (or None), the Q/DQ model of the bundle ``first``
            in ONNX Runtime; ``"fp32"``, the float model it was compiled from.
        data: Samples as the command line names them; without, a bundle's golden inputs, else random ones.
        threads: Threads that compute.
        rounds: Turns of every process.
        sessions: How often both processes are started anew.
        turn_s: Seconds aimed at for a turn.
        progress: Told about the rounds.

    Raises:
        BitwrightError: A model is refused, the two differ in their inputs, there is no artifact to run here, or a
            contestant's process failed.
    """
    a = open_given(first)
    b = _reference(a, second)
    check_same_inputs(a, b)
    feeds, source = sample_for(a if a.bundle is not None else b if b.bundle is not None else a, data)
    watcher = progress or Silent()
    watcher.phase("measure")
    with tempfile.TemporaryDirectory(prefix="bitwright-bench-") as folder:
        file = Path(folder) / "feeds.npz"
        write_npz(file, feeds)
        entries = (_candidate(a, file, threads), onnx_entry(b, file, threads))
        turns = take_turns(
            entries,
            rounds=rounds,
            sessions=sessions,
            turn_s=turn_s,
            step=lambda done, total: watcher.step(done, total, "rounds"),
        )
    return _result(entries, turns, source, (_how(a), b.how()))


def _reference(a: GivenModel, second: str | Path | None) -> GivenModel:
    """Return what the candidate is compared with."""
    if second is not None and str(second) not in (FLOAT, OWN):
        return open_given(second)
    if a.bundle is None:
        what = "there is nothing to compare it with"
        raise UsageError(what, where=a.label, fix="give a second model, or a bundle whose artifact is timed")
    return open_given(float_model_of(a.bundle)) if second == FLOAT else a


def _candidate(a: GivenModel, feeds: Path, threads: int) -> Entry:
    """Return the artifact of a bundle, or the model itself."""
    if a.bundle is None:
        return onnx_entry(a, feeds, threads)
    reason = a.bundle.why_not_executable()
    if reason:
        what = f"its artifact cannot be timed here: {reason}"
        raise UsageError(what, where=a.label, fix=f"compare models: {a.path}")
    device = a.bundle.profile.codegen.kind == "cuda"
    if device or not is_native(a.bundle.profile.toolchain.triple):
        what = "its artifact cannot be timed here: the time of an emulated artifact means nothing"
        raise UsageError(what, where=a.label, fix=f"compare models: {a.path}")
    return artifact_entry(a.label, a.bundle.path, feeds, threads)


def artifact_entry(label: str, bundle: Path, feeds: Path, threads: int) -> Entry:
    """Return the entry of a bundle's artifact."""
    return Entry(f"{label} (artifact)", "artifact", bundle, feeds, threads)


def onnx_entry(given: GivenModel, feeds: Path, threads: int) -> Entry:
    """Return the entry of a model in ONNX Runtime."""
    return Entry(f"{given.label} (ONNX Runtime)", "onnxruntime", given.path, feeds, threads, given.config)


def _how(a: GivenModel) -> str:
    return a.how() if a.bundle is None else f"{a.label}: its compiled artifact"


def _result(entries: tuple[Entry, Entry], turns: Turns, source: str, notes: tuple[str, ...]) -> BenchResult:
    one, two = (e.label for e in entries)
    threads = entries[0].threads
    ratio, around = turns.ratio(one, two), surroundings(turns.preempted)
    _, sessions, rounds = turns.medians.shape
    return BenchResult(
        first=one,
        second=two,
        ratio=ratio,
        first_s=turns.seconds(one),
        second_s=turns.seconds(two),
        first_best_s=turns.best_seconds(one),
        second_best_s=turns.best_seconds(two),
        threads=threads,
        clock=CLOCKS[turns.clock],
        sessions=sessions,
        rounds=rounds,
        surroundings=around,
        data=source,
        notes=notes,
        warnings=around.warnings(threads, ratio.half_width),
    )
