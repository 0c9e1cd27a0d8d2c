"""What is known about one activation tensor after the calibration pass."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitwright.compiler.calibrate.histogram import GrowingHistogram, finite_range


@dataclass
class TensorStatistics:
    """Running statistics of one tensor; memory does not depend on how much data it sees.

    Attributes:
        name: The tensor.
        low, high: Exact smallest and largest value; ``inf`` and ``-inf`` before the first value.
        average_low, average_high: Running average of each batch's smallest and largest value.
        batches: Non-empty batches seen.
        histogram: None when no method needs it.
        channel_axis: Axis of ``channel_max``, negative axes counted from the end; None when it is not wanted.
        channel_max: Largest magnitude of each channel, float32, shape (channels,); None when it is not
            wanted.
        averaging_constant: Weight of a new batch in the averages once ``1 / averaging_constant`` batches were
            seen. Until then the averages are plain means.
    """

    name: str
    low: float = math.inf
    high: float = -math.inf
    average_low: float = 0.0
    average_high: float = 0.0
    batches: int = 0
    histogram: GrowingHistogram | None = None
    channel_axis: int | None = None
    channel_max: NDArray[np.float32] | None = None
    averaging_constant: float = 0.01

    def update(self, values: NDArray[np.floating]) -> None:
        """Take one batch into account.

        Args:
            values: The tensor's value, any shape; an empty one changes nothing.

        Raises:
            DataError: The array is not floating point or not finite.
        """
        if values.size == 0:
            return
        # Not by ReduceMin and ReduceMax in the graph: ONNX Runtime's lose a NaN after the first element, and
        # with a third reduction to find it they are no faster than this.
        low, high = finite_range(values, self.name)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.batches += 1
        weight = max(self.averaging_constant, 1 / self.batches)
        self.average_low += weight * (low - self.average_low)
        self.average_high += weight * (high - self.average_high)
        if self.histogram is not None:
            self.histogram.update(values, (low, high))
        if self.channel_axis is not None:
            self._update_channels(values, self.channel_axis)

    def _update_channels(self, values: NDArray[np.floating], axis: int) -> None:
        others = tuple(a for a in range(values.ndim) if a != axis % values.ndim)
        # Two reductions instead of one over abs(values): no temporary of the tensor's size.
        found = np.maximum(values.max(axis=others), -values.min(axis=others)).astype(np.float32)
        self.channel_max = found if self.channel_max is None else np.maximum(self.channel_max, found)
