"""Calibration against ONNX Runtime's: wall time and peak memory on real models, each run in a fresh process.

    BITWRIGHT_ZOO=/path/to/zoo python benchmarks/calibration.py [--rounds 3] [--method minmax]

Three contenders see the same samples and the same tensors (inputs and outputs of the same operator types),
one sample at a time or in batches as each likes, pinned to one core:

- ``bitwright``: load the model, ``collect``, ``range_from`` of every tensor.
- ``ort-calibrator``: ``create_calibrator``, ``collect_data``, ``compute_data``.
- ``ort-quantize``: ``quantize_static``, which also quantizes and writes the model.

Wall time and peak memory are those of the whole process, interpreter and imports included; ``work`` leaves
them out. MiniLM runs on texts of different lengths with min/max. ONNX Runtime's percentile and entropy
calibrators fail on inputs of different shapes, so for those methods every text is cut to its first 16 tokens,
for all contenders. The MiniLM model is ``$BITWRIGHT_MINILM``, else ``$BITWRIGHT_ZOO/minilm_l6/model.onnx``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

CONTENDERS = ("bitwright", "ort-calibrator", "ort-quantize")
METHODS = ("minmax", "percentile", "entropy")
MINILM_SAMPLES, EQUAL_LENGTH = 64, 16


@dataclass(frozen=True)
class Case:
    """A model, its samples (leading axis: one) and the operators whose tensors are calibrated."""

    model: Path
    samples: list[dict[str, np.ndarray]]
    op_types: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, size: int) -> Any:
        """Yield ``size`` samples at a time, stacked along the leading axis."""
        for start in range(0, len(self.samples), size):
            group = self.samples[start : start + size]
            yield {k: np.concatenate([s[k] for s in group]) for k in group[0]}


def resnet8(zoo: Path, _method: str) -> Case:
    images = np.load(zoo / "resnet8_cifar10" / "data.npz")["calib_x"]
    model = zoo / "resnet8_cifar10" / "model.onnx"
    # Kept as bytes and converted when read, as a data reader would.
    operators = ("Conv", "Gemm", "MatMul", "Add", "Relu", "AveragePool", "GlobalAveragePool")
    return Images(model, [{"input": image[None]} for image in images], operators)


class Images(Case):
    """Samples stored as uint8 that the model reads as float32."""

    def batches(self, size: int) -> Any:
        """Yield float32 images."""
        for batch in super().batches(size):
            yield {k: v.astype(np.float32) for k, v in batch.items()}


def minilm(zoo: Path, method: str) -> Case:
    data = np.load(zoo / "minilm_l6" / "data.npz")
    model = Path(os.environ.get("BITWRIGHT_MINILM") or zoo / "minilm_l6" / "model.onnx")
    texts = [i[:n].astype(np.int64) for i, n in zip(data["calib_ids"], data["calib_len"], strict=True)]
    if method != "minmax":
        texts = [t[:EQUAL_LENGTH] for t in texts if len(t) >= EQUAL_LENGTH]
    samples = [
        {"input_ids": t[None], "attention_mask": np.ones_like(t)[None]} for t in texts[:MINILM_SAMPLES]
    ]
    return Case(model, samples, ("MatMul", "Gemm"))


MODULES = {
    "bitwright": ("onnx_ir", "bitwright.compiler.calibrate.stream"),
    "ort-calibrator": ("onnxruntime.quantization",),
    "ort-quantize": ("onnxruntime.quantization",),
}
CASES = {"resnet8": resnet8, "minilm": minilm}


def run_bitwright(case: Case, method: str, _folder: Path) -> int:
    import onnx_ir as ir

    from bitwright.compiler.calibrate.methods import parse_method, range_from
    from bitwright.compiler.calibrate.stream import collect

    model = ir.load(case.model)
    nodes = [n for n in model.graph if n.op_type in case.op_types]
    values = {
        v.name for n in nodes for v in (*n.inputs, *n.outputs) if v is not None and v.const_value is None
    }
    found = collect(model, case, sorted(v for v in values if v), method=parse_method(method))
    ranges = [range_from(s, parse_method(method), levels=256, symmetric=False) for s in found.values()]
    return len(ranges)


def reader(case: Case) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(case.batches(1))

        def get_next(self) -> Any:
            return next(self.batches, None)

    return Reader()


def ort_method(method: str) -> Any:
    from onnxruntime.quantization import CalibrationMethod

    names = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
    return CalibrationMethod[names[method]]


def run_ort_calibrator(case: Case, method: str, folder: Path) -> int:
    from onnxruntime.quantization.calibrate import create_calibrator

    calibrator = create_calibrator(
        case.model,
        list(case.op_types),
        augmented_model_path=str(folder / "augmented.onnx"),
        calibrate_method=ort_method(method),
        extra_options={"percentile": 99.99} if method == "percentile" else {},
    )
    calibrator.collect_data(reader(case))
    return len(calibrator.compute_data().data)


def run_ort_quantize(case: Case, method: str, folder: Path) -> int:
    from onnxruntime.quantization import QuantType, quantize_static

    extra = {"CalibPercentile": 99.99} if method == "percentile" else {}
    quantize_static(
        case.model,
        folder / "quantized.onnx",
        reader(case),
        op_types_to_quantize=list(case.op_types),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=ort_method(method),
        extra_options=extra,
    )
    return 0


RUNS = {"bitwright": run_bitwright, "ort-calibrator": run_ort_calibrator, "ort-quantize": run_ort_quantize}


def child(contender: str, case_name: str, method: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for module in MODULES[contender]:  # the work is timed without the imports, the process with them
        importlib.import_module(module)
    case = CASES[case_name](Path(os.environ["BITWRIGHT_ZOO"]), method)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        tensors = RUNS[contender](case, method, Path(folder))
        work = time.perf_counter() - start
    print(json.dumps({"work": work, "peak_mb": peak_mb(), "tensors": tensors}))


def peak_mb() -> float:
    """Return this process's largest resident set; ``ru_maxrss`` would include the parent's at the fork."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(contender: str, case: str, method: str) -> dict[str, float] | str:
    """Run one contender in a fresh process; a string is the reason it failed."""
    command = [sys.executable, __file__, "--child", contender, "--case", case, "--method", method]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "wall": wall}


def compare(case: str, method: str, rounds: int) -> None:
    runs: dict[str, list[dict[str, float]]] = {c: [] for c in CONTENDERS}
    failed: dict[str, str] = {}
    for _ in range(rounds):
        for contender in CONTENDERS:
            if contender in failed:
                continue
            result = measure(contender, case, method)
            if isinstance(result, str):
                failed[contender] = result
            else:
                runs[contender].append(result)
    for contender in CONTENDERS:
        label = f"| {case} | {method} | {contender} |"
        if contender in failed:
            print(f"{label} failed: {failed[contender]} |||||")
            continue
        median = {
            k: statistics.median(r[k] for r in runs[contender])
            for k in ("wall", "work", "peak_mb", "tensors")
        }
        tensors = f"{median['tensors']:.0f}" if median["tensors"] else ""
        print(
            f"{label} {median['wall']:.2f} | {median['work']:.2f} | {median['peak_mb']:.0f} | {tensors} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "BITWRIGHT_ZOO" not in os.environ:
        parser.error("set BITWRIGHT_ZOO to the folder of the real models")
    if options.child:
        child(options.child, options.case, options.method)
        return
    print(
        "| model | method | contender | wall s | work s | peak MB | tensors |\n|---|---|---|---|---|---|---|"
    )
    for case in [options.case] if options.case else CASES:
        for method in [options.method] if options.method else METHODS:
            compare(case, method, options.rounds)


if __name__ == "__main__":
    main()
