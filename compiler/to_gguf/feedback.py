"""Codes of blocks rounded anew, each error made good by the columns that are still to be rounded (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.calibrate.moments import moment_passes
from bitwright.compiler.calibrate.stream import Dataset
from bitwright.compiler.gguf.bit_planes import Bytes
from bitwright.compiler.gguf.blocks import FORMATS, NONLINEAR, Codes, Float32, Format, codes_of, encode
from bitwright.compiler.gguf.types import TensorType
from bitwright.compiler.llama.tensors import ModelTensor
from bitwright.compiler.moments import InputMoments
from bitwright.compiler.rounding.gptq import Feedback, factorize, gptq
from bitwright.compiler.rounding.grid import Grid, Quantizer
from bitwright.compiler.rounding.objective import shrinkage_of

# Rows that are rounded together; a few copies of them are in memory.
ELEMENTS = 1 << 22
# In the place of scale 0: whatever the level, what it stands for is nothing.
TINY = np.float32(2.0**-60)


class Feedbacks:
    """Second moments of what the matrices are multiplied with, a part of the model at a time.

    Matrices are asked for in the order they were named in; one pass over the data collects what fits the memory, and is
    forgotten when the next begins.

    Args:
        model: The normalized float model.
        dataset: Samples.
        tensors: Tensors of the file, in its order.
        threads: Threads of one operator.
        progress: Called with (samples done, all samples of a pass).
    """

    def __init__(
        self,
        model: ir.Model,
        dataset: Dataset,
        tensors: Sequence[ModelTensor],
        *,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        nodes = [reader.label for t in tensors if t.is_matrix for reader in t.readers[:1]]
        self._passes: Iterator[Mapping[str, InputMoments]] = moment_passes(
            model, dataset, nodes, rows=1, threads=threads, progress=progress
        )
        self._known: Mapping[str, InputMoments] = {}
        self._last: tuple[InputMoments, Feedback] | None = None

    def of(self, tensor: ModelTensor) -> Feedback | None:
        """Return how errors of a matrix pass on, None for what no linear layer reads."""
        if not tensor.is_matrix or not tensor.readers:
            return None
        label = tensor.readers[0].label
        while label not in self._known:
            self._known = next(self._passes)
        moments = self._known[label]
        # Matrices that read one normalization follow each other and share the factorization.
        if self._last is None or self._last[0] is not moments:
            self._last = moments, factorize(moments.second, shrinkage=shrinkage_of(moments.count))
        return self._last[1]


def with_feedback(weights: Float32, stored: Bytes, kind: TensorType, feedback: Feedback) -> Bytes:
    """Round a matrix again within the scales and minima that were found for it.

    The error of a layer's output for correlated inputs, ``(w - w')^T E[x x^T] (w - w')``, falls or stays: a row that
    gains nothing keeps its nearest codes.

    Args:
        weights: float32, shape (rows, columns).
        stored: The same in blocks, shape (rows, bytes of a row).
        kind: Their type, one with codes.
        feedback: Of the inputs that meet the columns.

    Returns:
        Blocks like ``stored``.
    """
    fmt, step = FORMATS[kind], max(1, ELEMENTS // weights.shape[1])
    parts = [
        _rounded(weights[k : k + step], stored[k : k + step], fmt, feedback)
        for k in range(0, len(weights), step)
    ]
    return np.concatenate(parts)


def _rounded(rows: Float32, stored: Bytes, fmt: Format, feedback: Feedback) -> Bytes:
    codes, grid = codes_of(fmt, stored.reshape(-1, fmt.type.bytes)), _grid(fmt)
    levels = gptq(np.ascontiguousarray(rows.T)[None], feedback, _quantizer(codes, fmt, grid, len(rows)))[0].T
    found: NDArray[np.integer] = (
        grid.index(levels) if fmt.type.name == "IQ4_NL" else np.rint(levels).astype(np.int32)
    )
    level = np.ascontiguousarray(found, np.int32).reshape(codes.level.shape)
    return encode(fmt, replace(codes, level=level)).reshape(stored.shape)


def _grid(fmt: Format) -> Grid:
    values = NONLINEAR if fmt.type.name == "IQ4_NL" else np.arange(fmt.low, fmt.high + 1)
    return Grid(fmt.type.name, values.astype(np.float64))


def _quantizer(codes: Codes, fmt: Format, grid: Grid, rows: int) -> Quantizer:
    """Return ``scale * level - minimum`` of every group as scales and (fractional) zero points."""
    scale = codes.d[:, None] * codes.scale.astype(np.float32)
    minimum = codes.dmin[:, None] * codes.offset.astype(np.float32)
    safe = np.where(scale == 0, TINY, scale)
    by_group = [np.ascontiguousarray(a.reshape(rows, -1).T)[None] for a in (safe, minimum / safe)]
    return Quantizer(grid, by_group[0], by_group[1], fmt.group)
