"""Circuits of real models: real samples in simulation, cycles against the closed form, the task's metric.

``BITWRIGHT_ZOO=... python benchmarks/fpga.py [--models kws_dscnn ...] [--bundle kws_dscnn=DIR ...] [--work DIR]``

A model without ``--bundle`` is compiled first: int8, a frame as fast as ``--luts`` allow; with ``--recipe short-mixed
--fps RATE`` that frame rate with the formats that lose least. A bundle may be any plan. Every layer of every frame is
compared with the integer reference, bit for bit; the metric is computed by the reference, which that proves, on
held-out samples.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zoo

from bitwright.compiler.bundle.bundle import LIBRARY_FOLDER, Bundle
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.fpga.circuit import from_frame, to_frame
from bitwright.targets.fpga.generator import compare_layers, read_circuit, reference_outputs
from bitwright.targets.fpga.host import Host
from bitwright.targets.fpga.network import Network
from bitwright.targets.fpga.simulation import build_simulator, simulate

FRAMES, SAMPLES = 20, 200


@dataclass(frozen=True)
class Task:
    """A model's held-out samples and its metric.

    Attributes:
        calibration: Samples that calibrate [N, ...].
        judging: Samples that formats are judged by; others than those that calibrate where there are enough.
        samples: Held-out samples [N, ...].
        labels: Classes, or None: the metric is then the mean square error of the reconstruction.
    """

    calibration: np.ndarray
    judging: np.ndarray
    samples: np.ndarray
    labels: np.ndarray | None

    def metric(self, outputs: np.ndarray) -> float:
        """Return top-1 accuracy in percent, or the mean square error."""
        if self.labels is None:
            return float(np.mean((outputs - self.samples[: len(outputs)]) ** 2))
        return 100 * float(np.mean(outputs.argmax(axis=1) == self.labels[: len(outputs)]))


def _kws() -> Task:
    data = zoo.load("kws_dscnn")
    x = (data["x"].astype(np.float32) - data["zp"]) * data["scale"]
    return Task(x[:100], x[:100], x[100:], data["y"][100:])


def _resnet() -> Task:
    data = zoo.load("resnet8_cifar10")
    spare = data["calib_x"].astype(np.float32)
    return Task(spare[:200], spare[200:], data["x"].astype(np.float32), data["y"])


def _autoencoder() -> Task:
    frames = zoo.load("ad_autoencoder")["frames"]
    windows = np.stack([frames[k : k + 5].reshape(-1) for k in range(len(frames) - 4)]).astype(np.float32)
    return Task(windows[:98], windows[:98], windows[98:], None)


TASKS: dict[str, Callable[[], Task]] = {
    "ad_autoencoder": _autoencoder,
    "kws_dscnn": _kws,
    "resnet8_cifar10": _resnet,
}


@dataclass(frozen=True)
class Asked:
    """How models are compiled that no bundle is given of.

    Attributes:
        luts: Most look-up tables.
        target: Profile.
        recipe: Recipe.
        fps: Frames a second; None: as many as fit.
    """

    luts: int
    target: str
    recipe: str
    fps: float | None


def compiled(model: str, task: Task, work: Path, asked: Asked) -> Path:
    """Compile a model to the circuit with the shortest interval, or the least loss, under a number of LUTs."""
    data, judging = work / f"{model}.npz", work / f"{model}-judging.npz"
    np.savez(data, input=task.calibration)
    np.savez(judging, input=task.judging)
    output = work / f"{model}-{asked.recipe}"
    options = Options(
        zoo.folder(model) / "model.onnx",
        asked.target,
        data=str(data),
        # 64 of these are used; by default 16 would be held back.
        validation=str(judging),
        output=output,
        recipe=asked.recipe,
        budget={"luts": float(asked.luts)} | ({} if asked.fps is None else {"fps": asked.fps}),
        objective="interval" if asked.fps is None else None,
    )
    compile_model(options)
    return output


@dataclass(frozen=True)
class Simulated:
    """What a simulation of real samples showed."""

    layers: int
    elements: int
    differing: int
    interval: float
    latency: int
    seconds: float


def simulated(folder: Path, host: Host, network: Network, task: Task) -> Simulated:
    """Simulate real samples, and compare every layer of every frame."""
    feeds = [{host.program.inputs[0]: task.samples[k : k + 1]} for k in range(FRAMES)]
    sources = [host.send(f) for f in feeds]
    frames = np.stack([to_frame(host.program, host.circuit.source, s) for s in sources])
    program = build_simulator(folder, network)
    start = time.perf_counter()
    trace = simulate(program, network, frames)
    seconds = time.perf_counter() - start
    layers = elements = differing = 0
    for k, source in enumerate(sources):
        expected = host.reference(source)[host.circuit.result]
        actual = from_frame(host.program, host.circuit.result, trace.outputs[k])
        elements, differing = elements + actual.size, differing + int((actual != expected).sum())
        for check in compare_layers(host, network, trace, k):
            layers += 1
            elements += check.actual.size
            differing += int((check.actual != check.expected).sum())
    return Simulated(layers, elements, differing, trace.interval, trace.latency, seconds)


def metrics(model: str, bundle: Bundle, host: Host, task: Task) -> tuple[float, float, float]:
    """Return the metric of the float model, of the Q/DQ model and of the circuit's reference."""
    name, output = host.program.inputs[0], host.program.outputs[0]
    samples = task.samples[:SAMPLES]
    session = open_session(zoo.folder(model) / "model.onnx", SessionConfig(optimize=False))
    one_by_one = [samples[k : k + 1] for k in range(len(samples))]
    floats = np.concatenate([run(session, {name: x})[output] for x in one_by_one])
    scaled = np.concatenate([run_program(host.program, {name: x})[output] for x in one_by_one])
    fixed = np.concatenate([reference_outputs(host, {name: x})[output] for x in one_by_one])
    return task.metric(floats), task.metric(scaled), task.metric(fixed)


def rows(models: list[str], bundles: dict[str, Path], work: Path, asked: Asked) -> Iterator[str]:
    """Yield the lines of the tables."""
    yield (
        "| model | weight bits | engines | layers x frames equal | differing integers | predicted cycles | simulated "
        "| latency | fp32 | Q/DQ | circuit | simulated in |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for model in models:
        task = TASKS[model]()
        folder = bundles.get(model) or compiled(model, task, work, asked)
        bundle = Bundle.open(folder)
        host, network = read_circuit(folder / LIBRARY_FOLDER, bundle.profile)
        found = simulated(folder / LIBRARY_FOLDER, host, network, task)
        values = metrics(model, bundle, host, task)
        codes = sorted({str(layer.code) for layer in network.layers if layer.code}, reverse=True)
        yield " | ".join(
            (
                f"| {model}",
                ", ".join(codes),
                str(len(network.engines)),
                f"{found.layers}",
                f"{found.differing} of {found.elements}",
                str(network.interval),
                f"{found.interval:g} ({found.interval / network.interval - 1:+.2%})",
                str(found.latency),
                *(f"{value:.2f}" for value in values),
                f"{found.seconds:.1f} s |",
            )
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--bundle", action="append", default=[], metavar="MODEL=DIR")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--luts", type=int, default=50_000)
    parser.add_argument("--target", default="ecp5-85f")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--fps", type=float)
    given = parser.parse_args()
    bundles = {name: Path(path) for name, _, path in (word.partition("=") for word in given.bundle)}
    with tempfile.TemporaryDirectory(prefix="bitwright-") as place:
        work = given.work or Path(place)
        work.mkdir(parents=True, exist_ok=True)
        asked = Asked(given.luts, given.target, given.recipe, given.fps)
        for line in rows(given.models, bundles, work, asked):
            print(line, flush=True)


if __name__ == "__main__":
    main()
