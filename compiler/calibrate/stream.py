"""One pass over the calibration data: every sample is run once, looked at, and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from bitwright.compiler.calibrate.histogram import DEFAULT_BINS, GrowingHistogram
from bitwright.compiler.calibrate.methods import Method, MovingAverage, needs_histogram
from bitwright.compiler.calibrate.observed import ObservedModel, observe
from bitwright.compiler.calibrate.statistics import TensorStatistics
from bitwright.compiler.errors import DataError

LARGEST_BATCH = 16
# More runs no faster (measured from 0.8 to 12 MB on ResNet-8) and only adds to the peak.
BATCH_BYTES = 1 << 20

Batch = Mapping[str, np.ndarray]


class Dataset(Protocol):
    """Calibration samples; can be iterated any number of times, each time alike."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batches(self, size: int) -> Iterable[Mapping[str, np.ndarray]]:
        """Yield input name -> array, at most ``size`` samples joined where the model's inputs allow it."""
        ...


def collect(
    model: ir.Model,
    dataset: Dataset,
    tensors: Sequence[str],
    *,
    method: Method,
    threads: int = 1,
    bins: int = DEFAULT_BINS,
    channel_axes: Mapping[str, int] | None = None,
    batch_bytes: int = BATCH_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TensorStatistics]:
    """Run the float model over the data and return the statistics of the named tensors.

    Memory beside the model is one batch of observed tensors and ``8 * bins`` bytes a tensor, however many
    samples there are and whatever shapes they have.

    Args:
        model: The float model; not changed.
        dataset: The samples.
        tensors: Floating-point graph inputs or node outputs of the main graph.
        method: What the statistics are for: a histogram is kept only for methods that need one, and a moving
            average is taken sample by sample.
        threads: Threads of one operator.
        bins: Bins of each histogram.
        channel_axes: Tensors (of ``tensors``) whose largest magnitude is wanted for each channel, and the
            channel axis.
        batch_bytes: How much the observed tensors of one batch may take; a single sample is always run.
        progress: Called with (samples done, all samples) after each batch.

    Raises:
        UsageError: A name is unknown, or names a constant.
        ModelError: ONNX Runtime refuses the model.
        DataError: No samples, samples that do not fit the model, or tensors that are not floating point or
            not finite.
    """
    constant = method.constant if isinstance(method, MovingAverage) else MovingAverage().constant
    axes = channel_axes or {}
    statistics = {
        name: TensorStatistics(
            name,
            histogram=GrowingHistogram(bins, name) if needs_histogram(method) else None,
            channel_axis=axes.get(name),
            averaging_constant=constant,
        )
        for name in tensors
    }
    with observe(model, list(statistics), threads=threads) as observed:
        size = 1 if isinstance(method, MovingAverage) else batch_size(observed, dataset, batch_bytes)
        for done, batch in counted_batches(dataset, size):
            for name, value in observed.run(batch):
                statistics[name].update(value)
            if progress is not None:
                progress(done, len(dataset))
    _check_seen(statistics.values())
    return statistics


def batch_size(observed: ObservedModel, dataset: Dataset, batch_bytes: int) -> int:
    """Choose a batch size by running one sample and measuring what comes out."""
    first = next(iter(dataset.batches(1)), None)
    if first is None:
        return 1
    sample = sum(value.nbytes for _, value in observed.run(first))
    size = max(1, min(LARGEST_BATCH, batch_bytes // max(sample, 1)))
    return size if size == 1 or _runs(observed, dataset, size) else 1


def _runs(observed: ObservedModel, dataset: Dataset, size: int) -> bool:
    """Tell whether the model takes several samples at once: a Reshape may fix what the inputs leave open."""
    try:
        for _ in observed.run(next(iter(dataset.batches(size)))):
            pass
    except DataError:
        return False
    return True


def counted_batches(dataset: Dataset, size: int) -> Iterator[tuple[int, Batch]]:
    """Yield every batch with the number of samples done after it."""
    done, total = 0, len(dataset)
    # A sample of a model with a fixed batch is longer than one.
    unit = 1 if size == 1 else max(_rows(next(iter(dataset.batches(1)))), 1)
    for batch in dataset.batches(size):
        done = min(total, done + (1 if size == 1 else max(_rows(batch) // unit, 1)))
        yield done, batch


def _rows(batch: Batch) -> int:
    return max((a.shape[0] for a in batch.values() if a.ndim), default=1)


def _check_seen(statistics: Iterable[TensorStatistics]) -> None:
    for found in statistics:
        if found.batches == 0:
            msg = "no sample gave this tensor a value"
            raise DataError(
                msg,
                where=f"tensor '{found.name}'",
                fix="give at least one calibration sample in which the tensor is not empty",
            )
