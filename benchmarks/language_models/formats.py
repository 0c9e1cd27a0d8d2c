"""tinylm in every weight format: bits a weight as they are in the file, and perplexity on held-out text.

``BITWRIGHT_ZOO=... python benchmarks/language_models/formats.py [--recipes w4 w4-awq ...] [--bits 4.5 ...]
[--windows 128] [--out DIR]``

A recipe may be given as ``w4@64``: with groups of 64. Perplexities are those of the written ONNX file in ONNX Runtime,
on 256-token windows of held-out text. Bits are those of all weights of the written graph for each weight of the float
model, scales, zero points, norms, embedding and head included, tables of positions and masks left out.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bitwright.compiler.deploy import quantize
from bitwright.compiler.ingest.model_reader import read_model
from bitwright.compiler.llama.recognise import recognise
from bitwright.compiler.llama.tensors import tensors_of
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session
from bitwright.compiler.plan.planner import runtime_of
from bitwright.passes.normalize import normalize
from bitwright.targets.loader import load_profile

WINDOW = 256
CALIBRATION = 128
UNIFORM = (
    "int8-row", "w8", "w4-nearest", "w4-awq", "w4-mse", "w4", "w4-awq-gptq", "w4-symmetric", "w4@64", "w4@128", "w4-k",
    "w4a8-rotated", "nf4", "w3", "w3@64", "w3@128", "w3-awq-gptq", "w3-rotated", "w2", "w2@64", "w2@128",
    "w2-rotated", "ternary", "binary", "w4-small", "w3-small", "w2-small",
)  # fmt: skip
# What reads the tables of positions, and nothing else.
OF_POSITIONS = {"Slice", "GroupQueryAttention"}


@dataclass(frozen=True)
class Row:
    """One file."""

    recipe: str
    bits: float
    kilobytes: float
    perplexity: float
    ratio: float
    seconds: float


def folder() -> Path:
    """Return tinylm's folder."""
    return Path(os.environ["BITWRIGHT_ZOO"]) / "tinylm"


def constants(model: ir.Model) -> int:
    """Return the bytes of all constants of a graph but the tables of positions."""
    return sum(
        v.const_value.nbytes
        for v in model.graph.initializers.values()
        if v.const_value is not None and not {n.op_type for n, _ in v.uses()} <= OF_POSITIONS
    )


def weights_of(path: Path) -> int:
    """Return the elements of all weights, a shared one counted once."""
    tensors = tensors_of(recognise(normalize(read_model(path).model).model))
    return sum(tensor.elements for tensor in tensors)


def perplexity(session: object, tokens: np.ndarray, windows: int) -> float:
    """Return the perplexity per token over evenly spaced windows."""
    losses = []
    for start in np.linspace(0, len(tokens) - WINDOW - 2, windows).astype(int):
        part = tokens[start : start + WINDOW + 1]
        logits = session.run(None, {"input_ids": part[None, :-1]})[0][0].astype(np.float64)  # type: ignore[attr-defined]
        logits -= logits.max(axis=-1, keepdims=True)
        losses.append((np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(WINDOW), part[1:]]).mean())
    return float(np.exp(np.mean(losses)))


@dataclass(frozen=True)
class Bench:
    """What every recipe is measured with."""

    model: Path
    samples: list[dict[str, np.ndarray]]
    tokens: np.ndarray
    windows: int
    out: Path
    weights: int
    base: float

    def row(self, recipe: str, bits: float | None = None) -> Row:
        """Quantize by a recipe and measure the file."""
        name, _, group = recipe.partition("@")
        label = recipe if bits is None else f"{recipe}, {bits:g} bits"
        stem = "-".join(label.replace("@", " g").replace("/", " ").replace(",", "").split())
        path = self.out / f"{stem}.onnx"
        start = time.monotonic()
        done = quantize(
            Options(
                model=self.model,
                target="host",
                data=self.samples,
                output=path,
                recipe=name,
                gate=False,
                group=int(group) if group else None,
                budget={} if bits is None else {"bits": bits},
                loss="sqnr" if bits is None else "kl",
                cache=None if bits is None else self.out / "losses",
            )
        )
        seconds = time.monotonic() - start
        table = runtime_of(load_profile("host"), "onnxruntime")
        model = ir.load(done.model)
        size = constants(model)
        found = perplexity(open_session(model, config_for(table, threads=1)), self.tokens, self.windows)
        return Row(label, 8 * size / self.weights, size / 1024, found, found / self.base, seconds)


def prepared(windows: int, out: Path) -> Bench:
    """Open model and data, and measure the float model."""
    out.mkdir(parents=True, exist_ok=True)
    path = folder() / "model.onnx"
    with np.load(folder() / "data.npz") as data:
        tokens, calibration = data["test"].astype(np.int64), data["calib"].astype(np.int64)
    samples = [{"input_ids": w[None]} for w in calibration[: CALIBRATION * WINDOW].reshape(-1, WINDOW)]
    model = ir.load(path)
    base = perplexity(open_session(model, SessionConfig(threads=1)), tokens, windows)
    return Bench(path, samples, tokens, windows, out, weights_of(path), base)


def table(rows: Iterable[Row]) -> str:
    """Return the table for the documentation."""
    lines = [
        "| recipe | bits a weight | KiB | perplexity | / fp32 | s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.recipe} | {r.bits:.2f} | {r.kilobytes:.0f} | {r.perplexity:.3f} | {r.ratio:.4f} | {r.seconds:.0f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Quantize, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="*", default=list(UNIFORM))
    parser.add_argument("--bits", nargs="*", type=float, default=[])
    parser.add_argument("--mixture", default="mixed-weights")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("format-files"))
    options = parser.parse_args()
    bench = prepared(options.windows, options.out)
    print(f"fp32 perplexity {bench.base:.4f}, {bench.weights} weights", flush=True)
    rows = []
    for recipe, bits in [
        *((options.mixture, b) for b in options.bits),
        *((r, None) for r in options.recipes),
    ]:
        rows.append(bench.row(recipe, bits))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    (options.out / "formats.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
