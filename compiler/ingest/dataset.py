"""Calibration and evaluation data: from .npz files, folders, the user's functions or memory, streamed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import repeat
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir

from bitwright.compiler.errors import DataError, UsageError
from bitwright.compiler.ingest import npz
from bitwright.compiler.ingest.limits import DEFAULT_LIMITS, Limits
from bitwright.compiler.ingest.samples import (
    InputSpec,
    Sample,
    SampleChecker,
    check_dtype,
    check_names,
    input_specs,
    present,
)
from bitwright.compiler.ingest.text import quoted
from bitwright.compiler.ingest.token_windows import is_token_source, token_samples
from bitwright.compiler.ingest.user_code import blaming, is_function_spec, load_function

# Random samples need a size where the model leaves it open; large enough for a few strided convolutions.
_OPEN_DIMENSION = 32


class Dataset:
    """Samples of a model, checked one by one as they are read; can be read any number of times.

    Making one reads the samples once, so that wrong data is refused before any work is done.

    Args:
        source: Where the samples come from, for messages.
        inputs: The model's inputs.
        open_samples: Starts a new iteration over the raw samples.
        limits: Budgets.
        warnings: Known before the samples are read.
        notes: How the samples were made of what is in the source.

    Attributes:
        source: Where the samples come from.
        inputs: The model's inputs.
        warnings: What is legal but suspicious about the data, each ``where: what``.
        notes: How the samples were made of what is in the source, each ``where: what``.

    Raises:
        DataError: A sample breaks a rule, or there is none; the message names the sample and the input.
    """

    def __init__(
        self,
        source: str,
        inputs: tuple[InputSpec, ...],
        open_samples: Callable[[], Iterator[Mapping[str, object]]],
        limits: Limits = DEFAULT_LIMITS,
        warnings: Iterable[str] = (),
        notes: Iterable[str] = (),
    ) -> None:
        self.source, self.inputs, self.notes = source, inputs, tuple(notes)
        self._open, self._limits = open_samples, limits
        checker = SampleChecker(inputs, source, limits)
        for sample in open_samples():
            checker.check(sample)
        if checker.count == 0:
            what = "there is no sample"
            raise DataError(what, where=source, fix="give at least one sample; 100 are a good start")
        self._count = checker.count
        self.warnings: tuple[str, ...] = (*warnings, *checker.warnings())

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples, each input name -> array of the model's shape (first dimension 1 for a batch).

        Raises:
            DataError: The source has other samples than when it was opened.
        """
        checker = SampleChecker(self.inputs, self.source, self._limits)
        for sample in self._open():
            yield checker.check(sample)
        if checker.count != self._count:
            what = f"gave {self._count} samples at first and {checker.count} later"
            raise DataError(
                what, where=self.source, fix="the samples must be the same every time they are read"
            )

    @property
    def stackable(self) -> bool:
        """Whether samples can be joined along the first axis: it is one varying dimension of every input."""
        names = {spec.dims[0] for spec in self.inputs if spec.varying_batch} - {None}
        return all(spec.varying_batch for spec in self.inputs) and len(names) <= 1

    def batches(self, size: int) -> Iterator[Sample]:
        """Yield the samples in order, joined along the first axis where the model allows it.

        Args:
            size: Most samples in a batch. Neighbours of different shapes are never joined, and samples of a
                model whose first dimension is fixed come one by one.
        """
        assert size >= 1, "a batch holds at least one sample"
        return joined_batches(self, size if self.stackable else 1)


def joined_batches(samples: Iterable[Sample], size: int) -> Iterator[Sample]:
    """Yield neighbours of one shape joined along the first axis, at most ``size`` of them."""
    waiting: list[Sample] = []
    for sample in samples:
        if waiting and (len(waiting) >= size or _shapes(sample) != _shapes(waiting[0])):
            yield _joined(waiting)
            waiting = []
        waiting.append(sample)
    if waiting:
        yield _joined(waiting)


def _shapes(sample: Sample) -> list[tuple[int, ...]]:
    return [array.shape for array in sample.values()]


def _joined(samples: list[Sample]) -> Sample:
    if len(samples) == 1:
        return samples[0]
    return {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}


def open_dataset(
    source: str | Path,
    model: ir.Model,
    limits: Limits = DEFAULT_LIMITS,
    inputs: tuple[InputSpec, ...] | None = None,
) -> Dataset:
    """Open samples named on the command line.

    Args:
        source: One of four forms. An ``.npz`` file: one array for each input; sample k of an array A for an
            input of rank r is ``A[k:k+1]`` if A has rank r, ``A[k]`` if it has rank r + 1; a scalar for a
            scalar input is the same in every sample. A folder of ``.npz`` files: one sample each, in order of
            their names, arrays exactly as the model takes them. ``FILE.py:FUNC``: FUNC() returns an iterable
            of dictionaries. Arrays that are no input of the model are ignored with a warning. For a decoder a
            stream of tokens, ``FILE.npz:ARRAY`` or ``FILE.txt``, cut into windows
            (:mod:`bitwright.compiler.ingest.token_windows`).
        model: The model.
        limits: Budgets.
        inputs: What samples hold, where that is not just the model's inputs; a stream of tokens is cut for the model.

    Raises:
        UsageError: There is no such file, folder or function.
        DataError: The data does not fit the model.
        ModelError: A stream of tokens is given, and the model is no decoder.
    """
    text, inputs = str(source), inputs or input_specs(model)
    if is_token_source(text, model, limits):
        inputs, samples, notes = token_samples(text, model, limits)
        return Dataset(text, inputs, samples, limits, notes=notes)
    if is_function_spec(text):
        function, script = load_function(text)
        return Dataset(text, inputs, lambda: _from_function(function, script, text), limits)
    path = Path(source)
    if path.is_dir():
        files = _files(path, limits)
        return Dataset(text, inputs, lambda: _from_files(files, limits), limits)
    if not path.is_file():
        fix = "give an .npz file, a folder of .npz files, FILE.py:FUNC, or tokens or a text for a decoder"
        what = "there is no such file or folder"
        raise UsageError(what, where=text, fix=fix)
    count, extra = _check_npz(path, inputs, limits)
    warnings = [f"{text}: array {quoted(name)}: is no input of the model, ignored" for name in extra]
    return Dataset(text, inputs, lambda: _from_npz(path, inputs, count, limits), limits, warnings)


def _check_npz(path: Path, inputs: tuple[InputSpec, ...], limits: Limits) -> tuple[int, list[str]]:
    with npz.opened(path) as archive:
        found = npz.headers(archive, path, limits)
    extra = check_names(found, inputs, str(path))
    inputs = present(inputs, found)
    shapes = {spec.name: found[spec.name].shape for spec in inputs}
    for spec in inputs:
        check_dtype(found[spec.name].dtype, spec, f"{path}: array {quoted(spec.name)}")
    return sample_count(shapes, inputs, str(path)), extra


def sample_count(shapes: Mapping[str, tuple[int, ...]], inputs: tuple[InputSpec, ...], source: str) -> int:
    """Return how many samples stacked arrays hold.

    Raises:
        DataError: An array has a rank that cannot hold samples of its input, or the arrays disagree.
    """
    counts: dict[str, int] = {}
    for spec in inputs:
        shape, rank = shapes[spec.name], len(spec.dims)
        if shape == () == spec.dims:
            continue
        if len(shape) not in (rank, rank + 1) or not shape:
            stacked = f"[samples, {', '.join('?' if d is None else str(d) for d in spec.dims)}]"
            what = f"has shape {list(shape)}, the model needs {spec}"
            raise DataError(what, where=f"{source}: array {quoted(spec.name)}", fix=f"save it as {stacked}")
        counts[spec.name] = shape[0]
    if len(set(counts.values())) > 1:
        what = "the arrays hold different numbers of samples: " + ", ".join(
            f"{quoted(name)} {n}" for name, n in counts.items()
        )
        raise DataError(what, where=source, fix="the first axis of every array is the samples")
    return next(iter(counts.values()), 1)


def _from_npz(path: Path, inputs: tuple[InputSpec, ...], count: int, limits: Limits) -> Iterator[Sample]:
    with ExitStack() as stack:
        archive = stack.enter_context(npz.opened(path))
        found = npz.headers(archive, path, limits)
        inputs = present(inputs, found)
        streams: dict[str, Iterator[np.ndarray]] = {}
        for spec in inputs:
            member = found[spec.name]
            if member.shape == ():
                streams[spec.name] = repeat(npz.whole(archive, member), count)
            elif len(member.shape) == len(spec.dims):
                streams[spec.name] = (row[None] for row in npz.rows(archive, member))
            else:
                streams[spec.name] = npz.rows(archive, member)
        for rows in zip(*streams.values(), strict=True):
            yield dict(zip(streams, rows, strict=True))


def _files(folder: Path, limits: Limits) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.suffix == ".npz")
    if not files:
        what = "holds no .npz file"
        raise DataError(what, where=str(folder), fix="write one .npz file for each sample")
    if len(files) > limits.files:
        what = f"holds {len(files)} files, more than {limits.files}"
        raise DataError(what, where=str(folder), fix="a few hundred samples are enough to calibrate")
    return files


def _from_files(files: list[Path], limits: Limits) -> Iterator[Sample]:
    for path in files:
        with npz.opened(path) as archive:
            found = npz.headers(archive, path, limits)
            for name, member in found.items():
                if member.bytes > limits.sample_bytes:
                    what = f"array {quoted(name)} has {member.bytes} bytes, more than {limits.sample_bytes}"
                    raise DataError(what, where=str(path), fix="a file of a folder holds one sample")
            sample = {name: npz.whole(archive, member) for name, member in found.items()}
        yield sample


def _from_function(
    function: Callable[..., object], script: Path, spec: str
) -> Iterator[Mapping[str, object]]:
    with blaming(script, spec):
        result = function()
    if not isinstance(result, Iterable) or isinstance(result, Mapping):
        what = f"returned {type(result).__name__}, not an iterable of dictionaries"
        raise DataError(what, where=spec, fix="yield one dictionary for each sample")
    end = object()
    iterator = iter(result)
    while True:
        with blaming(script, spec):
            sample = next(iterator, end)
        if sample is end:
            return
        yield cast(Mapping[str, object], sample)


def dataset_from_memory(
    data: Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]],
    model: ir.Model,
    limits: Limits = DEFAULT_LIMITS,
    inputs: tuple[InputSpec, ...] | None = None,
) -> Dataset:
    """Make a dataset of arrays that are in memory.

    Args:
        data: Input name -> stacked samples, by the rules of an ``.npz`` file; or an iterable of samples, each
            input name -> array of the model's shape.
        model: The model.
        limits: Budgets.
        inputs: What samples hold, where that is not just the model's inputs.

    Raises:
        DataError: The data does not fit the model.
    """
    inputs, source = inputs or input_specs(model), "data"
    if not isinstance(data, Mapping):
        # An iterator can be read once only.
        samples = data if isinstance(data, list | tuple) else list(data)
        return Dataset(source, inputs, lambda: iter(samples), limits)
    extra = check_names(data, inputs, source)
    inputs = present(inputs, data)
    arrays = {spec.name: np.asarray(data[spec.name]) for spec in inputs}
    for spec in inputs:
        check_dtype(arrays[spec.name].dtype, spec, f"{source}: array {quoted(spec.name)}")
    count = sample_count({name: a.shape for name, a in arrays.items()}, inputs, source)
    warnings = [f"{source}: array {quoted(name)}: is no input of the model, ignored" for name in extra]

    def rows() -> Iterator[Sample]:
        for k in range(count):
            yield {s.name: _row(arrays[s.name], k, len(s.dims)) for s in inputs}

    return Dataset(source, inputs, rows, limits, warnings)


def _row(array: np.ndarray, k: int, rank: int) -> np.ndarray:
    if array.ndim == 0:
        return array
    return array[k : k + 1] if array.ndim == rank else array[k]


def random_dataset(
    model: ir.Model, samples: int, seed: int, dims: Mapping[str, int] | None = None
) -> Dataset:
    """Make samples of random numbers: they exercise a model, and say nothing about its accuracy.

    Floats are standard normal; integers and booleans are 0 or 1, which is a legal index, mask and flag
    everywhere.

    Args:
        model: The model.
        samples: How many.
        seed: Equal seeds give equal samples.
        dims: Sizes for named dimensions. Others are 1 on the first axis and 32 elsewhere, with a warning.

    Raises:
        UsageError: ``samples`` is not positive.
    """
    if samples < 1:
        what = f"{samples} random samples"
        raise UsageError(what, fix="ask for at least one")
    inputs, chosen = input_specs(model), dict(dims or {})
    warnings = ["random data: every sample is random; ranges and accuracy mean nothing for real data"]
    shapes = {}
    for spec in inputs:
        shapes[spec.name] = tuple(_random_size(axis, d, chosen) for axis, d in enumerate(spec.dims))
        if any(not isinstance(d, int) and d not in (dims or {}) for d in spec.dims[1:]):
            warnings.append(
                f"random data: input {quoted(spec.name)}: {spec} gets shape {list(shapes[spec.name])}"
            )

    def generate() -> Iterator[Sample]:
        for k in range(samples):
            yield {s.name: _random_array(s, shapes[s.name], seed, k) for s in inputs}

    return Dataset("random data", inputs, generate, warnings=warnings)


def _random_size(axis: int, dim: int | str | None, chosen: dict[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    fallback = 1 if axis == 0 else _OPEN_DIMENSION
    return fallback if dim is None else chosen.setdefault(dim, fallback)


def _random_array(spec: InputSpec, shape: tuple[int, ...], seed: int, k: int) -> np.ndarray:
    generator = np.random.default_rng([seed, k, zlib.crc32(spec.name.encode())])
    if spec.dtype.kind in "iub":
        return np.asarray(generator.integers(0, 2, shape)).astype(spec.dtype)
    return np.asarray(generator.standard_normal(shape)).astype(spec.dtype)
