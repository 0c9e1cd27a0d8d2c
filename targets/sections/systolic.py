"""A systolic array of multiply-accumulators, described so that circuit, cycles and kernels follow from it."""

from __future__ import annotations

from typing import Literal

from bitwright.targets.sections.record import Count, Strict


class SystolicArray(Strict):
    """The array and its buffers.

    Attributes:
        rows, columns: Multiply-accumulators each way.
        dataflow: What stays in place while the others stream.
        activation_buffer_bytes, weight_buffer_bytes, accumulator_buffer_bytes: On-chip memories.
    """

    rows: Count
    columns: Count
    dataflow: Literal["output_stationary", "weight_stationary"]
    activation_buffer_bytes: Count
    weight_buffer_bytes: Count
    accumulator_buffer_bytes: Count
