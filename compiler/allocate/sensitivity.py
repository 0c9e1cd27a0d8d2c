"""How much each site loses in each format: the model's outputs with only that site quantized."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from bitwright.compiler.allocate.loss_cache import LossCache
from bitwright.compiler.allocate.losses import LOSS_KINDS, LossKind
from bitwright.compiler.allocate.parallel import Runner, runner
from bitwright.compiler.allocate.suffix import WEIGHTS_FILE, SharedWeights, cut_suffix
from bitwright.compiler.allocate.task import Outcome, Task
from bitwright.compiler.calibrate.cache import data_digest, model_digest
from bitwright.compiler.errors import DataError, UsageError, nearest
from bitwright.compiler.ingest.evaluator import eval_digest, load_eval
from bitwright.compiler.ort.layer_error import with_outputs
from bitwright.compiler.ort.session import SessionConfig, callable_model, open_session, run

BLOCK_BYTES = 1 << 30
# Every value is a file that is open while the float model runs; systems allow as few as 256.
_BLOCK_VALUES = 128

Build = Callable[[str, str], ir.Model]
Arrays = Mapping[str, np.ndarray]


class Samples(Protocol):
    """Samples that can be iterated any number of times, each time alike."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batches(self, size: int) -> Iterable[Arrays]:
        """Yield input name -> array, at most ``size`` samples joined."""
        ...


@dataclass(frozen=True)
class SiteLoss:
    """What one site loses in one format.

    Attributes:
        site: Its name.
        format: The format.
        loss: See :class:`~bitwright.compiler.allocate.losses.LossMeter`; for ``eval`` the relative drop of the
            metric, which noise can make negative. Infinite if the candidate cannot be used.
        reason: Why it is infinite, or "".
    """

    site: str
    format: str
    loss: float
    reason: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """How to measure.

    Attributes:
        loss: ``sqnr``, ``cosine``, ``kl`` or ``eval``.
        evaluate: For ``eval``: ``FILE.py:FUNC``, higher is better.
        config: Session options of the variants.
        workers: Processes of this machine.
        scheduler: Address of a dask scheduler instead, or None.
        cache: File of earlier measurements, or None.
        block_bytes: Disk space for values that suffixes start from; sites beyond it are measured in further
            blocks, each of which runs the float model once more.
    """

    loss: LossKind = "sqnr"
    evaluate: str | None = None
    config: SessionConfig = field(default_factory=SessionConfig)
    workers: int = 1
    scheduler: str | None = None
    cache: Path | None = None
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        if self.loss not in LOSS_KINDS:
            msg = f"unknown loss '{self.loss}'"
            raise UsageError(msg, where="sensitivity", fix=nearest(self.loss, LOSS_KINDS))
        if (self.loss == "eval") != (self.evaluate is not None):
            msg = "the loss 'eval' and a metric belong together"
            raise UsageError(
                msg, where="sensitivity", fix="pass both --eval FILE.py:FUNC and the loss 'eval'"
            )


def measure_sensitivity(
    model: ir.Model,
    candidates: Sequence[tuple[str, str]],
    build: Build,
    samples: Samples,
    how: Sensitivity | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[SiteLoss]:
    """Measure the loss of every candidate.

    Each is run once on every sample, from the first value that it changes to the outputs; what lies before is
    computed once for all candidates of a block. ``eval`` runs the whole model, because only the user's function
    knows its data.

    Args:
        model: The float model, shapes and types inferred.
        candidates: (site, format); neighbours should be close in the graph.
        build: Called as ``build(site, format)``: returns a copy of ``model`` in which only that site has that
            format. Unchanged weights should be the same tensor objects.
        samples: Inputs; not used by ``eval``.
        how: Loss, parallelism, cache.
        progress: Called with (candidates done, all).

    Returns:
        One loss a candidate, in the order of ``candidates``.

    Raises:
        DataError: No samples, or the float model fails on them.
        UsageError: The metric or the scheduler's address is wrong.
        ToolchainError: A worker process was killed, or no scheduler answers.
    """
    how = how or Sensitivity()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitwright-")))
        study = _Study(model, samples, how, folder)
        found = study.prepare(candidates, build, progress)
        run_tasks = stack.enter_context(runner(workers=how.workers, scheduler=how.scheduler))
        study.measure(run_tasks, found, progress)
    pairs = zip(candidates, found, strict=True)
    return [SiteLoss(s, f, o.loss, o.reason) for (s, f), o in pairs if o is not None]


@dataclass(frozen=True)
class _Pending:
    """A candidate that is not in the cache."""

    number: int
    site: str
    format: str
    key: str
    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class _Study:
    """One measurement: its files and what is still to be done."""

    def __init__(self, model: ir.Model, samples: Samples, how: Sensitivity, folder: Path) -> None:
        self._model, self._samples, self._how, self._folder = model, samples, how, folder
        self._cache = LossCache(how.cache)
        self._pending: list[_Pending] = []
        self._float_value = 0.0
        self._origin = self._fingerprint()

    def _fingerprint(self) -> str:
        """Return what every loss depends on: model, data, and what is computed of them."""
        how = self._how
        if how.evaluate is None:
            if not len(self._samples):
                msg = "there are no samples to measure losses on"
                raise DataError(msg, where="sensitivity", fix="pass at least one sample")
            data = data_digest(self._samples)
        else:
            metric = load_eval(how.evaluate)
            self._float_value = metric(callable_model(open_session(self._model, how.config)))
            data = f"{how.evaluate}:{eval_digest(how.evaluate)}:{self._float_value!r}"
        return f"{model_digest(self._model)}:{data}:{how.loss}:{how.config.to_json()}"

    def prepare(
        self,
        candidates: Sequence[tuple[str, str]],
        build: Build,
        progress: Callable[[int, int], None] | None,
    ) -> list[Outcome | None]:
        """Write the models of candidates that are not in the cache; return what is known already."""
        weights = SharedWeights(self._model, self._folder)
        found: list[Outcome | None] = []
        for number, (site, fmt) in enumerate(candidates):
            found.append(self._prepare_one(number, site, fmt, build(site, fmt), weights))
            if progress is not None and found[-1] is not None:
                progress(sum(o is not None for o in found), len(candidates))
        return found

    def _prepare_one(
        self, number: int, site: str, fmt: str, variant: ir.Model, weights: SharedWeights
    ) -> Outcome | None:
        inputs: tuple[str, ...] = ()
        outputs: tuple[str, ...] = ()
        if self._how.loss != "eval":
            suffix = cut_suffix(self._model, variant)
            if suffix is None:
                return Outcome(0.0)
            variant, inputs, outputs = suffix.model, suffix.inputs, suffix.outputs
        name = f"candidate_{number}.onnx"
        content = hashlib.sha256(weights.save(variant, name)).hexdigest()
        key = hashlib.sha256(f"{self._origin}:{content}".encode()).hexdigest()
        known = self._cache.get(key)
        if known is None:
            self._pending.append(_Pending(number, site, fmt, key, name, inputs, outputs))
        else:
            (self._folder / name).unlink()
        return known

    def measure(
        self,
        run_tasks: Runner,
        found: list[Outcome | None],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Run what is pending, block by block, and fill it in."""
        for block, tensors in self._blocks():
            for number, outcome in run_tasks([self._task(p, tensors) for p in block]):
                pending = block[number]
                self._cache.put(pending.key, pending.site, pending.format, outcome)
                found[pending.number] = outcome
                if progress is not None:
                    progress(sum(o is not None for o in found), len(found))
            for file in [*(p.file for p in block), *tensors.values()]:
                (self._folder / file).unlink()

    def _task(self, pending: _Pending, tensors: Mapping[str, str]) -> Task:
        how = self._how
        return Task(
            str(self._folder),
            pending.file,
            {n: tensors[n] for n in pending.inputs},
            {n: tensors[n] for n in pending.outputs},
            len(self._samples) if how.loss != "eval" else 0,
            how.loss,
            how.evaluate,
            self._float_value,
            how.config,
            (WEIGHTS_FILE,),
        )

    def _blocks(self) -> Iterator[tuple[list[_Pending], dict[str, str]]]:
        """Yield candidates with the files of the values they need."""
        if self._how.loss == "eval":
            yield self._pending, {}
            return
        if not self._pending:
            return
        names = dict.fromkeys(n for p in self._pending for n in (*p.inputs, *p.outputs))
        sizes = {n: a.nbytes * len(self._samples) for _, n, a in self._computed(list(names), first=True)}
        block: list[_Pending] = []
        wanted: dict[str, None] = {}
        for pending in self._pending:
            more = wanted | dict.fromkeys((*pending.inputs, *pending.outputs))
            full = sum(sizes[n] for n in more) > self._how.block_bytes or len(more) > _BLOCK_VALUES
            if block and full:
                yield block, self._recorded(list(wanted))
                block, more = [], dict.fromkeys((*pending.inputs, *pending.outputs))
            block.append(pending)
            wanted = more
        yield block, self._recorded(list(wanted))

    def _computed(self, names: list[str], *, first: bool = False) -> Iterator[tuple[int, str, np.ndarray]]:
        """Yield (sample, name, value) of the float model; a sample's own inputs are passed through."""
        fed = {v.name for v in self._model.graph.inputs}
        inside = [n for n in names if n not in fed]
        session = open_session(with_outputs(self._model, inside), self._how.config) if inside else None
        for k, sample in enumerate(self._samples.batches(1)):
            values = run(session, sample) if session is not None else {}
            for name in names:
                yield k, name, np.asarray(sample[name] if name in fed else values[name])
            if first:
                return

    def _recorded(self, names: list[str]) -> dict[str, str]:
        """Run the float model once over all samples and write what is wanted; return the file of each name."""
        files = {name: f"tensor_{k}.npz" for k, name in enumerate(names)}
        with ExitStack() as stack:
            archives = {
                n: stack.enter_context(zipfile.ZipFile(self._folder / f, "w", zipfile.ZIP_STORED))
                for n, f in files.items()
            }
            for k, name, value in self._computed(names):
                with archives[name].open(f"{k}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, value, allow_pickle=False)
        return files
