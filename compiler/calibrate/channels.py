"""Statistics of each channel of activations, in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.calibrate.histogram import finite_range
from bitwright.compiler.calibrate.observed import observe
from bitwright.compiler.calibrate.stream import BATCH_BYTES, Dataset, batch_size, counted_batches
from bitwright.compiler.errors import DataError
from bitwright.compiler.moments import ChannelStatistics

# Ends of a channel lie this many standard deviations beyond the mean of the samples' own ends, if it went so far: the
# very largest value of a few samples says little about the next ones.
SPREAD = 2.0


class _Ends:
    """Largest value of each channel, sample by sample."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = self._squares = np.zeros(1)
        self._largest = np.full(1, -np.inf)

    def update(self, ends: NDArray[np.float64]) -> None:
        """Take the ends of some samples, shape (n, C)."""
        self._count += len(ends)
        self._sum = self._sum + ends.sum(axis=0)
        self._squares = self._squares + (ends**2).sum(axis=0)
        self._largest = np.maximum(self._largest, ends.max(axis=0))

    def result(self) -> NDArray[np.float64]:
        mean = self._sum / self._count
        deviation = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0.0))
        found: NDArray[np.float64] = np.minimum(self._largest, mean + SPREAD * deviation)
        return found


class _Sums:
    """Running sums of one tensor (N, C, ...)."""

    def __init__(self, tensor: str) -> None:
        self._tensor = tensor
        self._high, self._low = _Ends(), _Ends()
        self._count = 0
        self._power = self._active = np.zeros(1)

    def update(self, values: np.ndarray) -> None:
        if values.size == 0:
            return
        finite_range(values, self._tensor)
        if values.ndim < 2:
            msg = "a tensor without a channel axis has no statistics of channels"
            raise DataError(msg, where=f"tensor '{self._tensor}'", fix="leave the tensor out")
        flat = values.reshape(*values.shape[:2], -1)
        self._high.update(flat.max(axis=2).astype(np.float64))
        self._low.update(-flat.min(axis=2).astype(np.float64))
        self._count += flat.shape[0] * flat.shape[2]
        self._power = self._power + np.einsum("ncs,ncs->c", flat, flat, dtype=np.float64)
        self._active = self._active + np.count_nonzero(flat, axis=(0, 2))

    def result(self) -> ChannelStatistics:
        if self._count == 0:
            msg = "no sample gave this tensor a value"
            raise DataError(
                msg,
                where=f"tensor '{self._tensor}'",
                fix="give at least one calibration sample in which the tensor is not empty",
            )
        return ChannelStatistics(
            low=np.minimum(-self._low.result(), 0.0),
            high=np.maximum(self._high.result(), 0.0),
            power=self._power / self._count,
            active=self._active / self._count,
        )


def collect_channels(
    model: ir.Model,
    dataset: Dataset,
    tensors: Sequence[str],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ChannelStatistics]:
    """Run the float model over the data and return statistics of each channel (axis 1) of the named tensors.

    Args:
        model: The float model; not changed.
        dataset: The samples.
        tensors: Floating-point graph inputs or node outputs of the main graph, of two or more dimensions.
        threads: Threads of one operator.
        progress: Called with (samples done, all samples) after each batch.

    Raises:
        UsageError: A name is unknown, or names a constant.
        ModelError: ONNX Runtime refuses the model.
        DataError: No samples, samples that do not fit the model, or tensors that are not floating point, not finite
            or have no channel axis.
    """
    sums = {name: _Sums(name) for name in tensors}
    with observe(model, list(sums), threads=threads) as observed:
        for done, batch in counted_batches(dataset, batch_size(observed, dataset, BATCH_BYTES)):
            for name, value in observed.run(batch):
                sums[name].update(value)
            if progress is not None:
                progress(done, len(dataset))
    return {name: found.result() for name, found in sums.items()}
