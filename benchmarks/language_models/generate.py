"""Generating text with 4-bit weights: the compiled artifact against ONNX Runtime's int4, one thread, by turns.

usage: BITWRIGHT_ZOO=... python benchmarks/language_models/generate.py [tinylm] [layers]

``tinylm``: the whole decoder, one new token behind 16, 64 and 256 others, and prompts of 16 and 64 tokens. ``layers``:
one layer and the head in the widths of a decoder with a billion parameters (random weights, a small vocabulary).

The artifact (`compile --context`) is called through its C runtime and keeps its caches; ONNX Runtime gets the same
Q/DQ weights: as `bitwright quantize` writes them (with its fusions for decoders), as plain Q/DQ at accuracy level 4
(activations rounded to 8 bits in blocks, as here) and at level 0 (float32), and the float model. Its inputs and outputs
are bound in advance. Each figure is the best thread CPU time of a call over the rounds.
"""

from __future__ import annotations

import os

os.environ["TVM_NUM_THREADS"] = "1"  # read when tvm is imported
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

import bitwright
from bitwright.compiler.bench.models import load_session_config
from bitwright.compiler.bundle.decoder import CompiledDecoder
from bitwright.compiler.compilation import Compilation
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.options import Options
from bitwright.compiler.ort.bound import bound_call
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session
from bitwright.compiler.pipeline import FRONT
from bitwright.targets.loader import load_profile

sys.path.insert(0, str(Path(__file__).parents[1]))
from turns import Call, best_times
from zoo import folder, load

LEVEL_KEY = "session.qdq_matmulnbits_accuracy_level"
CONTEXT = 512
CALLS = ((1, 16), (1, 64), (1, 256), (16, 0), (64, 0))
ROUNDS = 30
# Weights are rounded to nearest: their values change no time, and GPTQ takes minutes at these widths.
RECIPE = """schema: 1
name: w4-nearest
description: "4-bit weights in groups, rounded to nearest"
formats: [w4]
tables: [int8]
migrate: {equalize: false, smooth: false, disassemble: 0.0}
rounding: {scales: max, method: nearest, refine: false, correct_bias: false}
"""


def artifact_call(decoder: CompiledDecoder, tokens: np.ndarray, past: int) -> Call:
    """Return a call of the artifact behind so many tokens."""

    def call() -> object:
        decoder.length = past  # what the caches hold does not change the time
        return decoder.feed(tokens)

    return call


def feeds_of(session: ort.InferenceSession, tokens: np.ndarray, past: int) -> dict[str, np.ndarray]:
    """Return the inputs of a decoder whose caches hold random rows."""
    random = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for port in session.get_inputs():
        if len(port.shape) == 4:
            sizes = [n if isinstance(n, int) else 1 if k == 0 else past for k, n in enumerate(port.shape)]
            kind = np.float16 if "16" in port.type else np.float32
            found[port.name] = random.normal(size=sizes).astype(kind)
        elif port.name == "attention_mask":
            found[port.name] = np.ones((1, past + len(tokens)), np.int64)
        else:
            found[port.name] = tokens[None]
    return found


def rivals(model: Path, quantized: Path, plain: Path) -> Iterator[tuple[str, ort.InferenceSession]]:
    """Yield sessions of ONNX Runtime by name."""
    base = config_for(load_profile("host").runtimes.onnxruntime)
    written = load_session_config(quantized.with_name(quantized.stem + ".session.json"))
    yield "quantize", open_session(quantized, replace(written, threads=1))
    for level in ("4", "0"):
        entries = {**dict(base.session_config_entries or {}), LEVEL_KEY: level}
        yield f"plain, level {level}", open_session(plain, replace(base, session_config_entries=entries))
    yield "fp32", open_session(model, SessionConfig())


def table(name: str, model: Path, rows: np.ndarray, work: Path) -> None:
    """Compile, quantize and print one decoder."""
    data = {"input_ids": rows}
    out, recipe = work / "out", work / "nearest.yaml"
    recipe.write_text(RECIPE)
    given = {"target": "host", "recipe": str(recipe)}
    bitwright.compile(model, data=data, output=out, context=CONTEXT, golden=1, **given)
    np.savez(work / "tokens.npz", tokens=rows.ravel())
    stream = f"{work / 'tokens.npz'},window=64"
    quantized, plain = work / "fused.onnx", work / "plain.onnx"
    bitwright.quantize(model, data=stream, output=quantized, gate=False, stream="off", **given)
    write_plain(Options(model=model, data=stream, **given), plain)
    decoder = CompiledDecoder(out, threads=1)
    sessions = dict(rivals(model, quantized, plain))
    print(f"| {name} | artifact us | tokens/s | " + " | ".join(f"/ {rival}" for rival in sessions) + " |")
    print("| --- | --- | --- |" + " --- |" * len(sessions))
    for length, past in CALLS:
        tokens = rows[0][:length]
        calls = [artifact_call(decoder, tokens, past)]
        calls += [bound_call(s, feeds_of(s, tokens, past)) for s in sessions.values()]
        ours, *others = best_times(calls, ROUNDS)
        ratios = " | ".join(f"{ours / t:.2f}" for t in others)
        what = f"a token behind {past}" if length == 1 else f"a prompt of {length}"
        print(f"| {what} | {ours * 1e6:.0f} | {length / ours:.0f} | {ratios} |", flush=True)
    decoder.close()


def write_plain(options: Options, path: Path) -> None:
    """Write the Q/DQ model that is planned for the artifact, with the caches that the model has."""
    c = Compilation(options, load_profile("host"))
    for name, phase in FRONT:
        phase(c, [])
        if name == "quantize":
            break
    assert c.quantized is not None
    save_model(c.quantized, path)


def tinylm_table() -> None:
    """Print the whole small decoder."""
    tokens = load("tinylm")["calib"].astype(np.int64)
    rows = np.stack([tokens[k : k + 80] for k in range(0, 8 * 257, 257)])
    with tempfile.TemporaryDirectory() as work:
        table("tinylm", folder("tinylm") / "model_kv.onnx", rows, Path(work))


def layers_table() -> None:
    """Print one layer in the widths of a decoder with a billion parameters."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "null"))
    from checkpoints import CheckpointSizes, write_checkpoint

    from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
    from bitwright.compiler.hugging_face.graph import decoder_model

    sizes = CheckpointSizes(
        layers=1, width=2048, heads=32, key_heads=8, feed_forward=8192, vocabulary=2048, positions=1024
    )
    rows = np.random.default_rng(0).integers(0, sizes.vocabulary, (2, 80))
    with tempfile.TemporaryDirectory() as work:
        checkpoint = open_checkpoint(write_checkpoint(Path(work) / "folder", sizes))
        model = Path(work) / "model.onnx"
        save_model(decoder_model(checkpoint), model)
        table("one layer of 2048", model, rows, Path(work))


TABLES: dict[str, Callable[[], None]] = {"tinylm": tinylm_table, "layers": layers_table}


def main() -> None:
    """Print the tables."""
    for name in sys.argv[1:] or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main()
