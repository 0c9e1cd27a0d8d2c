"""The calibration step alone, imports excluded: our ranges against ONNX Runtime's quantize_static, turn by turn.

usage: BITWRIGHT_ZOO=... python benchmarks/calibration_step.py

Both learn min/max ranges from the same samples in one process pinned to one processor.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from zoo import Feeds, ZooModel, model_named

from bitwright.compiler.calibrate.methods import parse_method, range_from
from bitwright.compiler.calibrate.stream import collect
from bitwright.compiler.ingest.dataset import dataset_from_memory
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.plan.planner import observed_tensors, plan_selection
from bitwright.compiler.shape_choice import choose_dims, static_shapes
from bitwright.passes.normalize import normalize
from bitwright.targets.loader import load_profile

ROUNDS = 5
METHOD = "minmax"


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Samples in the form ONNX Runtime asks for."""

    def __init__(self, samples: Iterable[Feeds]) -> None:
        self._samples = iter(samples)

    def get_next(self) -> Feeds | None:
        """Return the next sample."""
        return next(self._samples, None)


def theirs(model: ZooModel, samples: list[Feeds]) -> float:
    """Return the seconds of quantize_static."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        quantize_static(
            str(model.path),
            str(Path(folder) / "q.onnx"),
            Reader(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )
        return time.perf_counter() - start


def row(name: str, count: int) -> str:
    """Measure one model."""
    entry = model_named(name)
    samples = list(entry.samples())[:count]
    profile, method = load_profile("host"), parse_method(METHOD)
    model = read_model(entry.path).model
    normalize(model, profile.runtimes.onnxruntime.opset)
    dataset = dataset_from_memory(samples, model)
    shapes = static_shapes(model, choose_dims(model, dataset.batches(1), {}))
    tensors = observed_tensors(plan_selection(model, profile, "onnxruntime", shapes))
    pairs = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for found in collect(model, dataset, tensors, method=method).values():
            range_from(found, method, levels=256, symmetric=False)
        pairs.append((time.perf_counter() - start, theirs(entry, samples)))
    ours, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return f"| {name} | {len(samples)} | {ours:.2f} s | {other:.2f} s | {ratio:.2f} |"


def main() -> None:
    """Print the table."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print("| model | samples | ours | quantize_static | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name, count in (("resnet8_cifar10", 200), ("minilm_l6", 64)):
        print(row(name, count), flush=True)


if __name__ == "__main__":
    main()
