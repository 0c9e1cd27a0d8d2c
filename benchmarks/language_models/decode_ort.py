"""A decoder's next token in ONNX Runtime: float as exported, float fused, and 4 bits, by turns in one process.

``[BITWRIGHT_ZOO=...] python benchmarks/language_models/decode_ort.py {tinylm,135m} [--caches] [--levels] [--layers N]``

``tinylm``: the zoo's decoder with a key-value cache. ``135m``: random weights in the sizes of SmolLM-135M, written as a
Hugging Face folder and exported; 30 layers are 540 MB in float32, more than any cache of a processor. ``--caches``
compares types of the key-value cache, with perplexities (tinylm) on 64 windows of 256 held-out tokens; ``--levels`` the
accuracy levels of MatMulNBits. Each figure is the best of many rounds of one thread's CPU time; inputs and outputs are
bound in advance, so nothing but the model is timed.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when numpy is imported

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from bitwright.compiler.deploy import quantize
from bitwright.compiler.fusion import narrowed
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.hugging_face.checkpoint import open_checkpoint
from bitwright.compiler.hugging_face.graph import decoder_model
from bitwright.compiler.ingest.evaluator import load_perplexity
from bitwright.compiler.options import Options
from bitwright.compiler.ort.bound import bound_call
from bitwright.compiler.ort.session import SessionConfig, callable_model, config_for, open_session
from bitwright.passes.fuse_decoder_attention import FuseDecoderAttention
from bitwright.passes.fuse_skip_norms import FuseSkipNorms
from bitwright.passes.join_attention_inputs import JoinAttentionInputs
from bitwright.passes.normalize import normalize
from bitwright.targets.loader import load_profile

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "null"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import CheckpointSizes, write_checkpoint
from turns import best_times

LEVEL_KEY = "session.qdq_matmulnbits_accuracy_level"
PASTS = (16, 64, 256)
ROUND_S = 0.006
SMOLLM = CheckpointSizes(
    layers=30,
    width=576,
    heads=9,
    key_heads=3,
    head_width=64,
    feed_forward=1536,
    vocabulary=49152,
    positions=2048,
)

Contestants = dict[str, tuple[ort.InferenceSession, ir.Model]]
Feeds = dict[str, np.ndarray]


def feeds(model: ir.Model, past: int, seed: int = 0, vocabulary: int = 2048) -> Feeds:
    """Return one token and random caches."""
    random = np.random.default_rng(seed)
    found = {}
    for value in model.graph.inputs:
        assert value.shape is not None and value.name is not None
        if len(value.shape) == 2:
            found[value.name] = random.integers(0, vocabulary, (1, 1))
        else:
            shape = (1, value.shape[1], past, value.shape[3])
            found[value.name] = random.standard_normal(shape).astype(np.float32)  # type: ignore[arg-type]
    return found


def tinylm(folder: Path) -> Path:
    """Return the zoo's decoder with a cache."""
    return Path(os.environ["BITWRIGHT_ZOO"]) / "tinylm" / "model_kv.onnx"


def smollm(layers: int) -> Callable[[Path], Path]:
    """Return what writes a random decoder of that shape."""

    def write(folder: Path) -> Path:
        source = write_checkpoint(folder / "checkpoint", replace(SMOLLM, layers=layers), dtype="float32")
        save_model(decoder_model(open_checkpoint(source), "cache"), folder / "model.onnx")
        return folder / "model.onnx"

    return write


def fused(path: Path) -> ir.Model:
    """Return a float model with our fusions and nothing else."""
    model = ir.load(path)
    normalize(model, 20)
    for step in (FuseDecoderAttention(), FuseSkipNorms(), JoinAttentionInputs()):
        if not step.run(model).changed:
            msg = f"{step.name} found nothing in {path}"
            raise SystemExit(msg)
    return model


def in_bits(path: Path, folder: Path, recipe: str, cache: str | None = None) -> Path:
    """Quantize as ``bitwright quantize`` does; without text, on eight random samples: weights decide the time."""
    model, text = ir.load(path), path.with_name("data.npz")
    samples = (
        f"{text}:calib,window=255,windows=32" if text.exists() else [feeds(model, 16, k) for k in range(8)]
    )
    output = folder / f"{recipe}-{cache}.onnx"
    quantize(Options(path, "host", output=output, data=samples, recipe=recipe, kv_cache=cache, stream="off"))
    return output


def level(config: SessionConfig, value: str) -> SessionConfig:
    """Return session options with another accuracy level."""
    return replace(config, session_config_entries={**(config.session_config_entries or {}), LEVEL_KEY: value})


def contestants(path: Path, folder: Path, arguments: argparse.Namespace) -> Contestants:
    """Open what takes turns."""
    config = config_for(load_profile("host").runtimes.onnxruntime)
    weights = in_bits(path, folder, arguments.recipe)
    found = {
        "fp32 as exported": (open_session(path), ir.load(path)),
        "fp32, fused": (open_session(model := fused(path)), model),
        arguments.recipe: (open_session(weights, config), ir.load(weights)),
    }
    for value in ("0", "1") if arguments.levels else ():
        found[f"{arguments.recipe}, level {value}"] = (
            open_session(weights, level(config, value)),
            ir.load(weights),
        )
    for kind in ("float16", "int8", "int4") if arguments.caches else ():
        narrow = in_bits(path, folder, arguments.recipe, kind)
        found[f"{arguments.recipe}, cache {kind}"] = (open_session(narrow, config), ir.load(narrow))
    return found


def perplexities(found: Contestants) -> None:
    """Print tinylm's perplexity with every contestant."""
    data = tinylm(Path()).with_name("data.npz")
    metric = load_perplexity(f"perplexity:{data}:test,window=256,windows=64")
    for name, (session, _) in found.items():
        print(f"perplexity of {name}: {-metric(callable_model(session)):.4f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["tinylm", "135m"])
    parser.add_argument("--recipe", default="w4")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--caches", action="store_true")
    parser.add_argument("--levels", action="store_true")
    arguments = parser.parse_args()
    write = tinylm if arguments.model == "tinylm" else smollm(arguments.layers)
    with tempfile.TemporaryDirectory() as work:
        path = write(Path(work))
        found = contestants(path, Path(work), arguments)
        print(f"| one token, microseconds | {' | '.join(found)} | speed-up over fp32 as exported, fused |")
        print(f"| --- {'| --- ' * (len(found) + 1)}|")
        for past in PASTS:
            given = feeds(ir.load(path), past)
            calls = {name: bound_call(s, narrowed([given], m)[0]) for name, (s, m) in found.items()}
            times = dict(zip(calls, best_times(list(calls.values()), arguments.rounds, ROUND_S), strict=True))
            ours = times[arguments.recipe]
            gains = ", ".join(f"{times[name] / ours:.2f}" for name in list(times)[:2])
            cells = " | ".join(f"{t * 1e6:.0f}" for t in times.values())
            print(f"| behind {past} | {cells} | {gains} |", flush=True)
        if arguments.model == "tinylm":
            perplexities(found)


if __name__ == "__main__":
    main()
