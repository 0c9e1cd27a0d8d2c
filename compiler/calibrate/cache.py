"""Calibration statistics as a file: a second compilation with the same model and data skips the pass."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from bitwright.compiler.calibrate.histogram import GrowingHistogram
from bitwright.compiler.calibrate.statistics import TensorStatistics
from bitwright.compiler.calibrate.stream import Dataset
from bitwright.compiler.errors import DataError

FORMAT = 1
HEADER = "header"
SCALARS = ("low", "high", "average_low", "average_high", "batches", "channel_axis", "averaging_constant")
HISTOGRAM_SCALARS = ("bins", "exponent", "first", "low", "high", "count", "zeros")


def model_digest(model: ir.Model) -> str:
    """Return the SHA-256 of a model's graph and weights, wherever the weights are stored."""
    copy, digest = model.clone(), hashlib.sha256()
    for name in sorted(copy.graph.initializers):
        value = copy.graph.initializers[name]
        if (tensor := value.const_value) is not None:
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape.numpy())}:".encode())
            digest.update(tensor.tobytes())
            value.const_value = None
    copy.graph.initializers.clear()
    digest.update(ir.to_proto(copy).SerializeToString(deterministic=True))
    return digest.hexdigest()


def data_digest(dataset: Dataset) -> str:
    """Return the SHA-256 of all samples, in their order."""
    digest = hashlib.sha256()
    for batch in dataset.batches(1):
        for name in sorted(batch):
            array = np.ascontiguousarray(batch[name])
            digest.update(f"{name}:{array.dtype.str}:{array.shape}:".encode())
            digest.update(array.data)
        digest.update(b";")
    return digest.hexdigest()


def save_statistics(path: Path, statistics: Mapping[str, TensorStatistics], *, model: str, data: str) -> None:
    """Write statistics to an .npz file.

    Args:
        path: The file; replaced if it exists.
        statistics: By tensor name.
        model: :func:`model_digest` of the model they were collected on.
        data: :func:`data_digest` of the samples.
    """
    arrays: dict[str, np.ndarray] = {}
    tensors = []
    for i, found in enumerate(statistics.values()):
        record = {"name": found.name, **{k: getattr(found, k) for k in SCALARS}, "histogram": None}
        if (histogram := found.histogram) is not None:
            record["histogram"] = {k: getattr(histogram, k) for k in HISTOGRAM_SCALARS}
            arrays[f"counts_{i}"] = histogram.counts
        if found.channel_max is not None:
            arrays[f"channel_max_{i}"] = found.channel_max
        tensors.append(record)
    header = json.dumps({"format": FORMAT, "model": model, "data": data, "tensors": tensors})
    temporary = path.with_name(path.name + ".part.npz")
    np.savez_compressed(temporary, allow_pickle=False, **{HEADER: np.array(header)}, **arrays)
    temporary.replace(path)


def load_statistics(path: Path, *, model: str, data: str) -> dict[str, TensorStatistics]:
    """Read statistics that :func:`save_statistics` wrote.

    Args:
        path: The file.
        model: Digest of the model they are wanted for.
        data: Digest of the samples.

    Raises:
        DataError: The file is not readable, or belongs to another model or other samples.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(str(file[HEADER][()]))
            _check_fresh(header, path, model, data)
            return {r["name"]: _read(r, i, file) for i, r in enumerate(header["tensors"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        msg = f"not a file of calibration statistics: {error}"
        raise DataError(
            msg,
            where=str(path),
            fix="delete it and calibrate again",
        ) from error


def _check_fresh(header: Any, path: Path, model: str, data: str) -> None:
    expected = {"format": FORMAT, "model": model, "data": data}
    for key, value in expected.items():
        if header[key] != value:
            msg = f"the calibration statistics are stale: they were collected with another {key}"
            raise DataError(
                msg,
                where=str(path),
                fix="delete the file and calibrate again",
            )


def _read(record: dict[str, Any], index: int, file: Mapping[str, np.ndarray]) -> TensorStatistics:
    found = TensorStatistics(record["name"], **{k: record[k] for k in SCALARS})
    if record["histogram"] is not None:
        found.histogram = _read_histogram(record["histogram"], record["name"], file[f"counts_{index}"])
    if found.channel_axis is not None:
        found.channel_max = file[f"channel_max_{index}"]
    return found


def _read_histogram(record: dict[str, Any], tensor: str, counts: np.ndarray) -> GrowingHistogram:
    scalars = {k: record[k] for k in HISTOGRAM_SCALARS}
    if counts.shape != (scalars["bins"],) or counts.dtype != np.int64 or counts.sum() != scalars["count"]:
        message = f"the histogram of '{tensor}' does not add up"
        raise ValueError(message)
    histogram = GrowingHistogram(scalars.pop("bins"), tensor)
    for key, value in scalars.items():
        setattr(histogram, key, value)
    histogram.counts = counts
    return histogram
