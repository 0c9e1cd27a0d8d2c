"""Quantization-aware training against the best that is done without: accuracy of both, and the CPU time it took.

usage: BITWRIGHT_ZOO=... python benchmarks/training.py kws|resnet8|tinylm [--minutes 14] [--part K] [--keep FOLDER]

Both image models come with few samples beside those that judge, so they are judged by cross-validation: the labelled
samples are cut into parts, and each part judges a model that the others trained, without their labels. No sample that
judges was trained on, calibrated with, or used to choose a state, and the mean over the parts judges every sample once.

- kws, 2-bit weights and 4-bit activations: 1000 recordings in five parts. Augmented by speed, shifts in time, loudness
  and noise. All that do not judge the result train; 100 of them choose among the states, which mostly means the last.
- resnet8, 4-bit weights and activations: 2000 images in two parts, and the 500 calibration images train both models.
  Augmented by mirroring and shifts.
- tinylm, ternary weights in groups: trained on the calibration tokens, and on what the float model writes itself.

The first and the last layer of the two image models keep 8 bits. Without training means: the same formats with
searched scales and GPTQ, calibrated with the same data before augmentation.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitwright.compiler import quantizing
from bitwright.compiler.compilation import Compilation, Silent
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.training import train as verb
from bitwright.compiler.training.entry import train
from bitwright.compiler.training.request import Precision, Training
from bitwright.passes.saturate_activations import SaturateActivations
from bitwright.targets.loader import load_profile

TARGET = "x86-avx512-vnni"
WINDOW, WINDOWS = 256, 128  # of the language model's metric
CHOOSING = 100  # images or recordings that choose the best state; no copy of the images is trained on
Metric = Callable[[ir.Model], float]


@dataclass(frozen=True)
class Task:
    """A model, what trains it and what judges it.

    Attributes:
        name: Of the row.
        model: The float model.
        plain: Samples that calibrate.
        samples: Samples that train.
        metric: Of a model.
        options: How to quantize.
        training: How to train.
        recipe: Formats where ``training`` names no width.
        judging: Samples that choose among the states of training, where a share of ``samples`` would be copies.
        calibrating: So many of ``samples`` calibrate before training, those that are no copies; None: all.
    """

    name: str
    model: Path
    plain: dict[str, np.ndarray]
    samples: dict[str, np.ndarray]
    metric: Metric
    training: Training
    recipe: str = "int8"
    judging: dict[str, np.ndarray] | None = None
    calibrating: int | None = None


def zoo(name: str) -> Path:
    return Path(os.environ["BITWRIGHT_ZOO"]) / name


def correct(x: np.ndarray, y: np.ndarray) -> Metric:
    """Return the share of samples whose class is found."""

    def measure(model: ir.Model) -> float:
        session = open_session(model, SessionConfig())
        name = session.get_inputs()[0].name
        parts = [next(iter(run(session, {name: x[k : k + 50]}).values())) for k in range(0, len(x), 50)]
        return float((np.concatenate(parts).argmax(1) == y).mean())

    return measure


def perplexity(tokens: np.ndarray) -> Metric:
    """Return the perplexity of a token over windows of the text."""

    def measure(model: ir.Model) -> float:
        session = open_session(model, SessionConfig())
        losses = []
        for start in np.linspace(0, len(tokens) - WINDOW - 2, WINDOWS).astype(int):
            window = tokens[start : start + WINDOW + 1].astype(np.int64)
            logits = next(iter(run(session, {"input_ids": window[None, :-1]}).values()))[0].astype(np.float64)
            logits -= logits.max(-1, keepdims=True)
            chosen = logits[np.arange(WINDOW), window[1:]]
            losses.append((np.log(np.exp(logits).sum(-1)) - chosen).mean())
        return float(np.exp(np.mean(losses)))

    return measure


def spoken(x: np.ndarray, copies: int, seed: int) -> np.ndarray:
    """Return maps of spectral coefficients with slower or faster, shifted, louder or softer and noisy copies."""
    random = np.random.default_rng(seed)
    return np.concatenate([x, *(np.stack([_spoken_again(one, random) for one in x]) for _ in range(copies))])


def _spoken_again(one: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return one recording, float32 (frames, coefficients, 1), as it might have been spoken again."""
    last = len(one) - 1
    at = (np.arange(last + 1.0) - last / 2) * random.uniform(0.8, 1.25) + last / 2 + random.uniform(-10, 10)
    at = at.clip(0, last)
    before = at.astype(np.int64)
    share = (at - before)[:, None, None]
    moved = one[before] * (1 - share) + one[np.minimum(before + 1, last)] * share
    moved *= random.normal(1, 0.1) * random.normal(1, 0.05, (1, one.shape[1], 1))
    moved[:, 0] += random.normal(0, 6)  # the first coefficient is loudness
    return (moved + random.normal(0, random.uniform(0, 1), one.shape)).astype(np.float32)


def pictured(x: np.ndarray, copies: int, seed: int) -> np.ndarray:
    """Return images with mirrored and shifted copies."""
    random = np.random.default_rng(seed)
    parts = [x]
    for _ in range(copies):
        padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
        places = random.integers(0, 9, (len(x), 2))
        mirrored = random.random(len(x)) < 0.5
        size = x.shape[1]
        moved = [padded[k, a : a + size, b : b + size] for k, (a, b) in enumerate(places)]
        parts.append(np.stack([m[:, ::-1] if turn else m for m, turn in zip(moved, mirrored, strict=True)]))
    return np.concatenate(parts)


def parts(count: int, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each of ``number`` parts of the samples, those outside it and those in it."""
    cut = np.array_split(np.random.default_rng(0).permutation(count), number)
    for k, part in enumerate(cut):
        yield np.concatenate([p for j, p in enumerate(cut) if j != k]), np.sort(part)


def kws(minutes: float) -> list[Task]:
    place = zoo("kws_dscnn")
    data = np.load(place / "data.npz")
    x, y = ((data["x"].astype(np.float32) - data["zp"]) * data["scale"]), data["y"]
    training = Training(
        Precision(2, 4),
        epochs=13.0,
        minutes=minutes,
        rate=1e-3,
        scale_rate=3e-3,
        temperature=2.0,
        mixture=0.4,
    )
    return [
        Task(
            f"kws W2A4, part {k + 1}",
            place / "model.onnx",
            {"input": x[own]},
            {"input": spoken(x[own], 20, 1)},
            correct(x[other], y[other]),
            training,
            judging={"input": x[own][:CHOOSING]},
            calibrating=len(own),
        )
        for k, (own, other) in enumerate(parts(len(x), 5))
    ]


def resnet8(minutes: float) -> list[Task]:
    place = zoo("resnet8_cifar10")
    data = np.load(place / "data.npz")
    x, y, plain = data["x"].astype(np.float32), data["y"], data["calib_x"].astype(np.float32)
    training = Training(
        Precision(4, 4),
        epochs=14.0,
        minutes=minutes,
        rate=5e-5,
        scale_rate=3e-4,
        hidden=1.0,
        mixture=0.5,
    )
    return [
        Task(
            f"resnet8 W4A4, part {k + 1}",
            place / "model.onnx",
            {"input": plain},
            {"input": pictured(np.concatenate([plain[:-CHOOSING], x[own]]), 8, 1)},
            correct(x[other], y[other]),
            training,
            judging={"input": plain[-CHOOSING:]},
            calibrating=len(plain) - CHOOSING + len(own),
        )
        for k, (own, other) in enumerate(parts(len(x), 2))
    ]


def written_by(model: Path, tokens: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return windows that a language model goes on writing behind a few tokens of the given text."""
    random = np.random.default_rng(seed)
    session = open_session(read_model(model).model, SessionConfig())
    start, prompt = random.integers(0, len(tokens) - 16, count), 8
    text = np.stack([tokens[s : s + prompt] for s in start]).astype(np.int64)
    cache = {
        i.name: np.zeros((count, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[1:]
    }
    step = text
    while text.shape[1] < WINDOW:
        found = run(session, {"input_ids": step, **cache})
        logits = found.pop("logits")[:, -1].astype(np.float64)
        cache = {name.replace("present", "past"): array for name, array in found.items()}
        step = (logits + random.gumbel(size=logits.shape)).argmax(-1)[:, None]  # a draw from the distribution
        text = np.concatenate([text, step], axis=1)
    return text


def tinylm(minutes: float) -> list[Task]:
    place = zoo("tinylm")
    data = np.load(place / "data.npz")
    windows = data["calib"].astype(np.int64).reshape(-1, WINDOW)
    own = written_by(place / "model_kv.onnx", data["calib"], 256, 2)
    samples = {"input_ids": np.concatenate([windows, own])}
    training = Training(epochs=8.0, minutes=minutes, batch=4, rate=1e-3, held=0.05)
    metric = perplexity(data["test"])
    plain = {"input_ids": windows[::4]}
    return [Task("tinylm ternary", place / "model.onnx", plain, samples, metric, training, "ternary")]


def without_training(task: Task) -> float:
    """Return the metric of searched scales and GPTQ."""
    options = Options(task.model, TARGET, task.plain, recipe=task.recipe)
    c = Compilation(options, load_profile(TARGET), Silent())
    tensors = verb.start_plan(c, task.training)
    assert c.plan is not None
    model = quantizing.quantized_model(c, c.plan)
    SaturateActivations(verb._levels(c, task.training, tensors)).run(model)
    return task.metric(model)


def measure(task: Task, output: Path, threads: int) -> None:
    """Print one row."""
    floating = task.metric(read_model(task.model).model)
    before = without_training(task)
    cpu, wall = time.process_time(), time.perf_counter()
    options = Options(task.model, TARGET, task.samples, output=output, recipe=task.recipe, threads=threads)
    if task.calibrating is not None:
        options = replace(options, samples=task.calibrating)
    if task.judging is not None:
        place = output.with_suffix(".judging.npz")
        np.savez(place, **task.judging)  # type: ignore[arg-type]
        options = replace(options, validation=str(place))
    found = train(options, replace(task.training, save_every=10**9))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    after = task.metric(read_model(found.model).model)
    print(
        f"| {task.name} | {floating:.4f} | {before:.4f} | {after:.4f} | {found.outcome.steps} | "
        f"{cpu / 60:.1f} | {wall / 60:.1f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = {"kws": kws, "resnet8": resnet8, "tinylm": tinylm}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", type=int, default=None, help="one part alone, counted from 1")
    parser.add_argument("--keep", type=Path, default=None)
    asked = parser.parse_args()
    print("| task | float | without training | trained | steps | CPU min | wall min |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        for k, task in enumerate(tasks[asked.task](asked.minutes)):
            if asked.part in (None, k + 1):
                measure(task, folder / f"{asked.task}{k}.onnx", asked.threads)


if __name__ == "__main__":
    main()
