"""Quantization against ONNX Runtime's: wall time and peak memory on real models, each run in a fresh process.

    BITWRIGHT_ZOO=/path/to/zoo python benchmarks/calibration.py [--rounds 3] [--case resnet8] [--method minmax]

From a float model file to a quantized model file on one core, with the same samples and the same calibration
method, the contenders taking turns:

- ``bitwright``: every phase of ``bitwright quantize`` that makes the model: reading with all checks,
  normalization with its check of equality, plan, calibration, ranges, rounding, writing. Left out is what ONNX
  Runtime's tool has nothing like: the gate on speed and the audit.
- ``ranges``: the same, ending when the range of every tensor is known.
- ``onnxruntime``: ``quantize_static`` on a model that was preprocessed (``quant_pre_process``) as its
  documentation asks.
- ``preprocess``: ``quant_pre_process`` alone, which a user of ``quantize_static`` has to run before.

Wall time and peak memory are those of the whole process, interpreter and imports included; ``work`` leaves the
imports out. Samples come one at a time from the same generator; Bitwright may join them into batches.

MiniLM runs on texts of different lengths with min/max. ONNX Runtime's percentile and entropy calibrators fail
on inputs of different shapes, so for those every text is cut or repeated to 16 tokens, for all contenders; so is
every text of ``minilm-256``, whose samples show what grows with their number. The MiniLM model is
``$BITWRIGHT_MINILM``, else ``$BITWRIGHT_ZOO/minilm_l6/model.onnx``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("minmax", "percentile", "entropy")
PERCENTILE = 99.99
TOKENS = 16
TARGET = "x86-avx2"


@dataclass(frozen=True)
class Case:
    """A model, its samples (leading axis: one) and the operators that are quantized."""

    model: Path
    samples: list[dict[str, np.ndarray]]
    op_types: tuple[str, ...]
    dtype: type[np.generic]

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield up to ``size`` neighbours of equal shapes, joined along the leading axis, in the input's type."""
        for _, alike in groupby(self.samples, lambda sample: [a.shape for a in sample.values()]):
            while group := list(islice(alike, size)):
                yield {k: np.concatenate([s[k] for s in group]).astype(self.dtype) for k in group[0]}


def resnet8(zoo: Path, _method: str) -> Case:
    images = np.load(zoo / "resnet8_cifar10" / "data.npz")["calib_x"]
    model = zoo / "resnet8_cifar10" / "model.onnx"
    operators = ("Conv", "Gemm", "MatMul", "Add", "Relu", "AveragePool", "GlobalAveragePool")
    # Kept as bytes and converted when read, as a data reader would.
    return Case(model, [{"input": image[None]} for image in images], operators, np.float32)


def minilm(zoo: Path, method: str) -> Case:
    return _minilm(zoo, 64, equal=method != "minmax")


def minilm_256(zoo: Path, _method: str) -> Case:
    return _minilm(zoo, 256, equal=True)


def _minilm(zoo: Path, samples: int, *, equal: bool) -> Case:
    data = np.load(zoo / "minilm_l6" / "data.npz")
    texts = [ids[:n] for ids, n in zip(data["calib_ids"], data["calib_len"], strict=True)][:samples]
    if equal:
        texts = [np.resize(text, TOKENS) for text in texts]
    feeds = [{"input_ids": t[None], "attention_mask": np.ones_like(t)[None]} for t in texts]
    return Case(minilm_model(zoo), feeds, ("MatMul", "Gemm"), np.int64)


def minilm_model(zoo: Path) -> Path:
    return Path(os.environ.get("BITWRIGHT_MINILM") or zoo / "minilm_l6" / "model.onnx")


CASES: dict[str, Callable[[Path, str], Case]] = {
    "resnet8": resnet8,
    "minilm": minilm,
    "minilm-256": minilm_256,
}


def run_bitwright(case: Case, method: str, _prepared: Path, folder: Path) -> None:
    from bitwright.compiler import frontend
    from bitwright.compiler.graph.saving import save_model

    c, selection = _calibrated(case, method)
    plan = frontend.allocate(c, selection, "onnxruntime")
    save_model(frontend.quantized_model(c, plan), folder / "quantized.onnx")


def run_ranges(case: Case, method: str, _prepared: Path, _folder: Path) -> None:
    from bitwright.compiler import frontend
    from bitwright.compiler.plan.planner import observed_tensors

    c, selection = _calibrated(case, method)
    frontend.ranges_of(c, observed_tensors(selection))


def _calibrated(case: Case, method: str) -> tuple[Any, Any]:
    """Run the phases up to calibration; returns the compilation and what is quantized."""
    from bitwright.compiler import frontend
    from bitwright.compiler.compilation import Compilation, Silent
    from bitwright.compiler.ingest.model_reader import read_model
    from bitwright.compiler.options import Options
    from bitwright.compiler.plan.planner import observed_tensors
    from bitwright.targets.loader import load_profile

    text = f"percentile:{PERCENTILE}" if method == "percentile" else method
    c = Compilation(Options(case.model, TARGET, data={}, method=text), load_profile(TARGET), Silent())
    c.source, c.dataset = read_model(case.model), case  # type: ignore[assignment]
    frontend.normalize_model(c, [])
    frontend.choose_shapes(c, [])
    selection = frontend.select_units(c, "onnxruntime")
    frontend.calibrate(c, observed_tensors(selection), [])
    return c, selection


def run_onnxruntime(case: Case, method: str, prepared: Path, folder: Path) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(case.batches(1))

        def get_next(self) -> Any:
            return next(self.batches, None)

    names = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
    quantize_static(
        prepared,
        folder / "quantized.onnx",
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(case.op_types),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=CalibrationMethod[names[method]],
        extra_options={"CalibPercentile": PERCENTILE} if method == "percentile" else {},
    )


def run_preprocess(case: Case, _method: str, prepared: Path, _folder: Path) -> None:
    from onnxruntime.quantization import quant_pre_process

    # Its symbolic shape inference does not know every model; its documentation says to skip it then.
    quant_pre_process(case.model, prepared, skip_symbolic_shape=True)


RUNS = {
    "preprocess": run_preprocess,
    "bitwright": run_bitwright,
    "ranges": run_ranges,
    "onnxruntime": run_onnxruntime,
}
TURNS = ("bitwright", "ranges", "onnxruntime")
# Imported before the work is timed.
MODULES = {
    "preprocess": "onnxruntime.quantization",
    "bitwright": "bitwright.compiler.cli.app",
    "ranges": "bitwright.compiler.cli.app",
    "onnxruntime": "onnxruntime.quantization",
}


def child(contender: str, case_name: str, method: str, prepared: Path) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    importlib.import_module(MODULES[contender])
    case = CASES[case_name](Path(os.environ["BITWRIGHT_ZOO"]), method)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        RUNS[contender](case, method, prepared, Path(folder))
        work = time.perf_counter() - start
    print(json.dumps({"work": work, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Return this process's largest resident set in MiB; ``ru_maxrss`` would include the parent's at the fork."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure(contender: str, case: str, method: str, prepared: Path) -> dict[str, float] | str:
    """Run one contender in a fresh process; a string is the reason it failed."""
    options = ["--child", contender, "--case", case, "--method", method, "--prepared", str(prepared)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *options], capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "wall": wall}


def compare(case: str, methods: tuple[str, ...], rounds: int, folder: Path) -> None:
    prepared = folder / f"{case}.onnx"
    samples = len(CASES[case](Path(os.environ["BITWRIGHT_ZOO"]), methods[0]))
    runs = [measure("preprocess", case, methods[0], prepared) for _ in range(rounds)]
    print_row(case, "", "", "preprocess", runs)
    for method in methods:
        found: dict[str, list[dict[str, float] | str]] = {contender: [] for contender in TURNS}
        for _ in range(rounds):
            for contender, results in found.items():
                results.append(measure(contender, case, method, prepared))
        for contender, results in found.items():
            print_row(case, str(samples), method, contender, results)


def print_row(
    case: str, samples: str, method: str, contender: str, runs: list[dict[str, float] | str]
) -> None:
    label = f"| {case} | {samples} | {method} | {contender} |"
    numbers = [run for run in runs if not isinstance(run, str)]
    if len(numbers) < len(runs):
        reason = next(run for run in runs if isinstance(run, str))
        print(f"{label} failed: {reason} ||||", flush=True)
        return
    wall, work, peak = (statistics.median(r[k] for r in numbers) for k in ("wall", "work", "peak_mb"))
    print(f"{label} {wall:.2f} | {work:.2f} | {peak:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--prepared", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "BITWRIGHT_ZOO" not in os.environ:
        parser.error("set BITWRIGHT_ZOO to the folder of the real models")
    if options.child:
        child(options.child, options.case, options.method, options.prepared)
        return
    print("| model | samples | method | contender | wall s | work s | peak MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in [options.case] if options.case else CASES:
            methods = (options.method,) if options.method else METHODS
            compare(case, methods, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
