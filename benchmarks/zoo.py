"""The real models the benchmarks and the zoo tests run on: calibration samples and task metrics on held-out samples.

The models and data are not part of the project; ``BITWRIGHT_ZOO`` names the folder that holds them, and
``BITWRIGHT_MINILM`` the built minilm model if it is not in that folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

Feeds = dict[str, np.ndarray]
Run = Callable[[Feeds], dict[str, np.ndarray]]


@dataclass(frozen=True)
class ZooModel:
    """One model.

    Attributes:
        name: Folder name.
        metric: What ``evaluate`` returns.
        bound: The value the quantized model must reach, given the float value.
        higher_is_better: Direction of the metric.
        samples: Calibration samples.
        evaluate: Metric on samples that do not calibrate.
    """

    name: str
    metric: str
    bound: Callable[[float], float]
    higher_is_better: bool
    samples: Callable[[], Iterator[Feeds]]
    evaluate: Callable[[Run], float]

    @property
    def path(self) -> Path:
        """The model file."""
        override = os.environ.get("BITWRIGHT_MINILM") if self.name == "minilm_l6" else None
        return Path(override) if override else folder(self.name) / "model.onnx"


def folder(name: str) -> Path:
    """Return the folder of a zoo model."""
    return Path(os.environ["BITWRIGHT_ZOO"]) / name


def load(name: str) -> dict[str, np.ndarray]:
    """Return the arrays of a model's data."""
    with np.load(folder(name) / "data.npz") as archive:
        return {key: archive[key] for key in archive.files}


def _accuracy(run: Run, name: str, x: np.ndarray, y: np.ndarray, batch: int = 100) -> float:
    outputs = [next(iter(run({name: x[k : k + batch]}).values())) for k in range(0, len(x), batch)]
    return float((np.concatenate(outputs).argmax(1) == y).mean())


def _kws() -> tuple[np.ndarray, np.ndarray]:
    data = load("kws_dscnn")
    return (data["x"].astype(np.float32) - data["zp"]) * data["scale"], data["y"]


def _kws_samples() -> Iterator[Feeds]:
    return ({"input": x[None]} for x in _kws()[0][:100])


def _kws_metric(run: Run) -> float:
    x, y = _kws()
    return _accuracy(run, "input", x[100:], y[100:])


def _resnet_samples() -> Iterator[Feeds]:
    return ({"input": x[None].astype(np.float32)} for x in load("resnet8_cifar10")["calib_x"][:200])


def _resnet_metric(run: Run) -> float:
    data = load("resnet8_cifar10")
    return _accuracy(run, "input", data["x"].astype(np.float32), data["y"])


def _vww() -> np.ndarray:
    return load("vww_mobilenet")["x"].astype(np.float32) / 255


def _vww_samples() -> Iterator[Feeds]:
    return ({"input": x[None]} for x in _vww()[:100])


def _vww_metric(run: Run) -> float:
    return _accuracy(run, "input", _vww()[100:], load("vww_mobilenet")["ref"][100:].argmax(1), 50)


def _ad() -> np.ndarray:
    frames = load("ad_autoencoder")["frames"]
    return np.stack([frames[k : k + 5].reshape(-1) for k in range(len(frames) - 4)]).astype(np.float32)


def _ad_samples() -> Iterator[Feeds]:
    return ({"input": x[None]} for x in _ad()[:100])


def _ad_metric(run: Run) -> float:
    x = _ad()[100:]
    return float(((run({"input": x})["output"] - x) ** 2).mean())


def _minilm_samples() -> Iterator[Feeds]:
    data = load("minilm_l6")
    for ids, length in zip(data["calib_ids"][:512], data["calib_len"][:512], strict=True):
        yield {
            "input_ids": ids[None, :length].astype(np.int64),
            "attention_mask": np.ones((1, int(length)), np.int64),
        }


def _minilm_metric(run: Run) -> float:
    from scipy.stats import spearmanr

    data = load("minilm_l6")
    ids, lengths = data["ids"].astype(np.int64), data["len"]
    order = np.argsort(lengths, kind="stable")
    embeddings = np.zeros((len(lengths), 384), np.float32)
    for k in range(0, len(order), 32):
        batch = order[k : k + 32]
        longest = int(lengths[batch].max())
        mask = (np.arange(longest)[None] < lengths[batch][:, None]).astype(np.int64)
        embeddings[batch] = next(
            iter(run({"input_ids": ids[batch, :longest], "attention_mask": mask}).values())
        )
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return float(spearmanr((embeddings[0::2] * embeddings[1::2]).sum(1), data["y"])[0])


def _tinylm_samples() -> Iterator[Feeds]:
    tokens = load("tinylm")["calib"].astype(np.int64)
    return ({"input_ids": tokens[None, k : k + 256]} for k in range(0, 32 * 256, 256))


def _tinylm_metric(run: Run) -> float:
    tokens = load("tinylm")["test"].astype(np.int64)
    losses = []
    for k in np.linspace(0, len(tokens) - 258, 128).astype(int):
        window = tokens[k : k + 257]
        logits = run({"input_ids": window[None, :-1]})["logits"][0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses.append((np.log(np.exp(logits).sum(-1)) - logits[np.arange(256), window[1:]]).mean())
    return float(np.exp(np.mean(losses)))


def _ppocr_lines() -> Iterator[tuple[int, Feeds, str]]:
    data = load("ppocr_rec")
    offset = 0
    for k, width in enumerate(data["w"].tolist()):
        pixels = data["pix"][offset : offset + 48 * width * 3].reshape(48, width, 3)
        offset += 48 * width * 3
        x = ((pixels.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]
        yield k, {"x": np.ascontiguousarray(x)}, str(data["text"][k])


def _ppocr_samples() -> Iterator[Feeds]:
    calibrating = int(load("ppocr_rec")["calib_n"])
    return (feeds for k, feeds, _ in _ppocr_lines() if k < calibrating)


def edit_distance(first: str, second: str) -> int:
    """Return the Levenshtein distance."""
    previous = list(range(len(second) + 1))
    for a in first:
        current = [previous[0] + 1]
        for j, b in enumerate(second):
            current.append(min(previous[j] + (a != b), previous[j + 1] + 1, current[-1] + 1))
        previous = current
    return previous[-1]


def _ppocr_metric(run: Run) -> float:
    model = onnx.load(folder("ppocr_rec") / "model.onnx", load_external_data=False)
    characters = {p.key: p.value for p in model.metadata_props}["character"].split("\n")
    alphabet = ["", *characters, " "]
    calibrating = int(load("ppocr_rec")["calib_n"])
    errors = total = 0
    for k, feeds, text in _ppocr_lines():
        if k < calibrating:
            continue
        best = next(iter(run(feeds).values()))[0].argmax(-1)
        kept = [v for j, v in enumerate(best) if v and (j == 0 or v != best[j - 1])]
        errors += edit_distance(text, "".join(alphabet[v] for v in kept))
        total += len(text)
    return 1 - errors / total


MODELS = (
    ZooModel("kws_dscnn", "top-1", lambda _: 0.905, True, _kws_samples, _kws_metric),
    ZooModel("resnet8_cifar10", "top-1", lambda _: 0.760, True, _resnet_samples, _resnet_metric),
    ZooModel("vww_mobilenet", "agreement with fp32", lambda _: 0.985, True, _vww_samples, _vww_metric),
    ZooModel("ad_autoencoder", "reconstruction MSE", lambda f: 1.06 * f, False, _ad_samples, _ad_metric),
    ZooModel("minilm_l6", "STS-B Spearman", lambda _: 0.813, True, _minilm_samples, _minilm_metric),
    ZooModel("ppocr_rec", "character accuracy", lambda _: 0.985, True, _ppocr_samples, _ppocr_metric),
    ZooModel("tinylm", "perplexity", lambda f: 1.06 * f, False, _tinylm_samples, _tinylm_metric),
)


def model_named(name: str) -> ZooModel:
    """Return one model."""
    return next(m for m in MODELS if m.name == name)
