"""What an error of each input costs: the mean square of what the linear layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bitwright.compiler.calibrate.observed import observe
from bitwright.compiler.calibrate.stream import Dataset
from bitwright.compiler.errors import DataError
from bitwright.compiler.llama.tensors import ModelTensor

Float64 = NDArray[np.float64]


def mean_squares(
    model: ir.Model,
    dataset: Dataset,
    tensors: Iterable[ModelTensor],
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Float64]:
    """Run the float model over the data and return the mean square of each column's input, by tensor.

    Only the diagonals of the second moments are kept: a few kilobytes for each layer, whatever its size.

    Args:
        model: The normalized float model.
        dataset: Samples.
        tensors: Tensors of the file; those that no linear layer reads (an embedding with a head of its own) have no
            entry in the result.
        threads: Threads of one operator.
        progress: Called with (samples done, all samples).

    Raises:
        DataError: No samples, samples that do not fit the model, or an input that is not finite.
    """
    read = {t.name: [r.data.name or "" for r in t.readers] for t in tensors if t.is_matrix and t.readers}
    names = list(dict.fromkeys(name for found in read.values() for name in found))
    sums: dict[str, Float64] = {}
    rows: dict[str, int] = {}
    with observe(model, names, threads=threads) as observed:
        for done, batch in enumerate(dataset.batches(1), start=1):
            for name, value in observed.run(batch):
                flat = value.reshape(-1, value.shape[-1]).astype(np.float64)
                sums[name] = sums.get(name, 0.0) + np.einsum("rc,rc->c", flat, flat)
                rows[name] = rows.get(name, 0) + len(flat)
            if progress is not None:
                progress(done, len(dataset))
    _check(sums, names)
    return {
        t: np.sum([sums[n] for n in found], axis=0) / sum(rows[n] for n in found) for t, found in read.items()
    }


def _check(sums: dict[str, Float64], names: list[str]) -> None:
    for name in names:
        if name not in sums or not np.isfinite(sums[name]).all():
            what = (
                "no sample gave this tensor a value"
                if name not in sums
                else "the samples make this tensor infinite"
            )
            raise DataError(what, where=f"tensor '{name}'", fix="check the calibration samples")
