"""Compile and quantize every zoo model; print the Markdown tables of docs/benchmarks.md.

usage: BITWRIGHT_ZOO=... python benchmarks/zoo_table.py [--targets host,arm-cortex-a76] [MODEL ...]

Metrics are measured on samples that did not calibrate. ONNX Runtime ratios are paired runs on one thread: thread CPU
time of `bitwright quantize`'s output over the original fp32 model, median of the pairs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from zoo import MODELS, Feeds, Run, ZooModel, model_named

from bitwright.compiler.deploy import quantize
from bitwright.compiler.errors import BitwrightError
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.ort.timing import time_reopened
from bitwright.compiler.pipeline import compile_model


def runner(path: Path, config: SessionConfig | None = None) -> Run:
    """Return a function that runs a model file on one thread."""
    session = open_session(path, config)
    return lambda feeds: run(session, feeds)


def session_config(path: Path) -> SessionConfig:
    """Return the options that were written beside the model."""
    options = json.loads(path.read_text())
    return SessionConfig(
        session_config_entries=options["session_config_entries"],
        disabled_optimizers=options["disabled_optimizers"],
    )


def timing_feeds(model: ZooModel, samples: list[Feeds]) -> list[Feeds]:
    """Return the four longest samples: short ones measure ONNX Runtime's overhead per call."""
    return sorted(samples, key=lambda s: -max(a.size for a in s.values()))[:4] or samples[:4]


def compiled_row(model: ZooModel, target: str, folder: Path) -> str:
    """Compile for one target and return a table row."""
    start = time.perf_counter()
    try:
        bundle = compile_model(
            Options(model=model.path, target=target, data=list(model.samples()), output=folder / target)
        )
    except BitwrightError as error:
        return f"| {model.name} | {target} | exit {error.exit_code}: {error.what.splitlines()[0]} | | | | |"
    assert bundle is not None
    seconds = time.perf_counter() - start
    verification = bundle.report["verification"]
    value = model.evaluate(runner(bundle.path / "model.onnx"))
    exact = f"{verification['calls'] - len(verification['kernel_differences'])} of {verification['calls']}"
    return (
        f"| {model.name} | {target} | {verification['executed']} | {exact} | {verification['elements']:,} "
        f"| {value:.4f} | {seconds:.0f} s |"
    )


def deployed_row(model: ZooModel, folder: Path) -> str:
    """Quantize for ONNX Runtime and return a table row."""
    start = time.perf_counter()
    samples = list(model.samples())
    made = quantize(
        Options(model=model.path, target="host", data=samples, output=folder / f"{model.name}.onnx")
    )
    seconds = time.perf_counter() - start
    config = session_config(made.session)
    before = model.evaluate(runner(model.path))
    after = model.evaluate(runner(made.model, config))
    timing = time_reopened(
        lambda: open_session(made.model, config),
        lambda: open_session(model.path),
        timing_feeds(model, samples),
        sessions=9,
    )
    gate = made.report["gate"]
    placement = "float" if isinstance(gate, dict) and gate["all_float"] else "int8"
    sizes = f"{model.path.stat().st_size / 1e6:.2f} -> {made.model.stat().st_size / 1e6:.2f}"
    return (
        f"| {model.name} | {model.metric} | {before:.4f} | {after:.4f} | {model.bound(before):.4f} | {placement} "
        f"| {timing.ratio:.2f} | {sizes} | {seconds:.0f} s |"
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[m.name for m in MODELS])
    parser.add_argument("--targets", default="host,arm-cortex-a76")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        print("| model | metric | fp32 | int8 | must reach | in ONNX Runtime | time / fp32 | MB | quantize |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        for name in arguments.models:
            print(deployed_row(model_named(name), Path(work)), flush=True)
        print(
            "\n| model | target | executed | kernel calls bit-exact | elements | metric of model.onnx | compile |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in arguments.models:
            for target in arguments.targets.split(","):
                print(compiled_row(model_named(name), target, Path(work) / name), flush=True)


if __name__ == "__main__":
    main()
