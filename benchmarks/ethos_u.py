"""Ethos-U through Vela: cycles, memories, accuracy by the TFLite reference kernels, and what fewer bits a weight buy.

``BITWRIGHT_ZOO=... python benchmarks/ethos_u.py [--models ad_autoencoder ...] [--out DIR]``

Numerics are those of TensorFlow Lite's reference kernels, cycles are Vela's estimates: nothing is executed on silicon.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zoo import Feeds, ZooModel, model_named

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.ethos_u.execution import host_inputs, host_outputs, translated
from bitwright.targets.ethos_u.generator import STATIC_MODEL, TFLITE_FILE
from bitwright.targets.ethos_u.litert import ReferenceSession
from bitwright.targets.loader import load_profile

MODELS = ("kws_dscnn", "resnet8_cifar10", "vww_mobilenet", "ad_autoencoder")
TARGETS = ("ethos-u55-128", "ethos-u85-256")
# TFLite's own int8 conversion of the same networks, on the same data (vww: agreement on all 250 images).
TFLITE = {"kws_dscnn": 0.902, "resnet8_cifar10": 0.760, "vww_mobilenet": 0.984, "ad_autoencoder": 10.27}
# Share of int8's time that a low-bit plan may take.
LOW_BIT = {
    ("ad_autoencoder", "ethos-u55-128"): 0.545,
    ("ad_autoencoder", "ethos-u85-256"): 0.70,
    ("resnet8_cifar10", "ethos-u55-128"): 0.97,
}
# Models whose way of calibrating is judged, too, where one image decides.
JUDGED = ("vww_mobilenet",)
GOLDEN = 20


@dataclass(frozen=True)
class Row:
    """One compiled model."""

    model: str
    target: str
    plan: str
    cycles: int
    milliseconds: float
    on_npu: str
    sram_kib: float
    constants_kib: float
    bits: float
    layers: str
    outputs: str
    float_metric: float
    metric: float
    reference_metric: float | None
    formats: str


def build(
    model: ZooModel, target: str, out: Path, recipe: str, budget: dict[str, float], method: str = "mse"
) -> Bundle:
    """Compile one model."""
    shutil.rmtree(out, ignore_errors=True)
    options = Options(
        model=model.path,
        data=list(model.samples()),
        target=target,
        dims={"N": 1},
        output=out,
        recipe=recipe,
        golden=GOLDEN,
        budget=budget,
        method=method,
    )
    bundle = compile_model(options)
    assert bundle is not None
    return bundle


class TfliteRun:
    """Runs a bundle's TFLite file by the reference kernels, sample by sample."""

    def __init__(self, bundle: Bundle) -> None:
        folder = bundle.path / "lib"
        self._translation = translated(folder / STATIC_MODEL)
        self._session = ReferenceSession(folder / TFLITE_FILE)

    def __call__(self, feeds: Feeds) -> Feeds:
        """Return the outputs of a batch."""
        count = len(next(iter(feeds.values())))
        batches = [self._one({k: v[i : i + 1] for k, v in feeds.items()}) for i in range(count)]
        return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}

    def _one(self, feeds: Feeds) -> Feeds:
        return host_outputs(self._translation, self._session.run(host_inputs(self._translation, feeds)))


def row(model: ZooModel, target: str, plan: str, bundle: Bundle) -> Row:
    """Read a bundle's report and measure its metric, in ONNX Runtime and by the reference kernels."""
    report, session = bundle.report, open_session(model.path, SessionConfig())
    figures = {m["label"]: m["value"] for m in report["generated"]["measurements"]}
    found = report["verification"]
    mine = [o for o in found["outputs"] if o["reference"] == "golden"]
    different = sum(o["difference"]["differing"] for o in mine)
    total = sum(o["difference"]["elements"] for o in mine)
    formats: dict[str, int] = {}
    for layer in report["layers"]:
        if layer["weight"]:
            formats[layer["format"]] = formats.get(layer["format"], 0) + 1
    kib = {k: float(v.split()[0].replace(",", "")) for k, v in figures.items() if k.startswith("Memory")}
    sram = kib.pop("Memory: sram", 0.0)
    return Row(
        model.name,
        target,
        plan,
        int(figures["Cycles of an inference"].replace(",", "")),
        float(figures["Time of an inference"].split()[0]),
        figures["Operators on the accelerator"],
        sram,
        sum(kib.values()),
        float(figures["Stored weight"].split()[0]),
        f"{found['calls'] - len(found['kernel_differences'])} of {found['calls']}",
        f"{different} of {total}",
        model.evaluate(lambda feeds: run(session, feeds)),
        model.evaluate(lambda feeds: bundle.run(feeds, "ort")),
        model.evaluate(TfliteRun(bundle)) if target == TARGETS[0] else None,
        ", ".join(f"{n} {name}" for name, n in formats.items()),
    )


def rows(names: list[str], out: Path) -> Iterator[Row]:
    """Compile everything, int8 first, then the low-bit plans at a share of int8's time."""
    for name in names:
        model = model_named(name)
        for target in TARGETS:
            whole = row(
                model, target, "int8", build(model, target, out / f"{name}-{target}-int8", "int8", {})
            )
            yield whole
            if name in JUDGED and target == TARGETS[0]:
                folder = out / f"{name}-{target}-judged"
                yield row(
                    model, target, "int8, judged ranges", build(model, target, folder, "int8", {}, "judged")
                )
            if (name, target) in LOW_BIT:
                seconds = whole.cycles / load_profile(target).clock_hz
                budget = {"latency": LOW_BIT[name, target] * seconds}
                yield low_bit(model, target, out, budget)


def low_bit(model: ZooModel, target: str, out: Path, budget: dict[str, float]) -> Row:
    """Compile the plan that loses least within a time."""
    folder = out / f"{model.name}-{target}-low"
    return row(model, target, "allocated", build(model, target, folder, "short-mixed", budget))


def table(found: list[Row]) -> str:
    """Return a Markdown table."""
    heads = [
        "model",
        "target",
        "plan",
        "cycles",
        "ms",
        "on the NPU",
        "SRAM KiB",
        "flash or DRAM KiB",
        "bits a weight",
        "layers equal",
        "outputs unlike Q/DQ",
        "metric float32",
        "metric Q/DQ",
        "metric TFLite kernels",
        "TFLite's own int8",
        "formats",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for r in found:
        reference = "" if r.reference_metric is None else f"{r.reference_metric:.4f}"
        cells = [
            *(
                r.model,
                r.target,
                r.plan,
                f"{r.cycles:,}",
                f"{r.milliseconds:.3f}",
                r.on_npu,
                f"{r.sram_kib:.1f}",
            ),
            *(
                f"{r.constants_kib:.1f}",
                f"{r.bits:.2f}",
                r.layers,
                r.outputs,
                f"{r.float_metric:.4f}",
                f"{r.metric:.4f}",
                reference,
            ),
            *(f"{TFLITE[r.model]:.4g}", r.formats),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--out", type=Path, default=Path("ethos-u-benchmark"))
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    found = []
    for each in rows(asked.models, asked.out):
        found.append(each)
        print(table([each]).splitlines()[-1], flush=True)
    print("\n" + table(found))
    (asked.out / "rows.json").write_text(json.dumps([vars(r) for r in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
