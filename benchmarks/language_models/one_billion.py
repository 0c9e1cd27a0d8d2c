"""A decoder of a billion weights from a folder to 4 bits: what memory each step takes.

    python benchmarks/language_models/one_billion.py --work FOLDER

makes a folder with random weights as Hugging Face has them (bfloat16, 2.2 GB), exports it and quantizes it by the
command line, and watches the memory of both processes. Then it opens the result, lets it generate, and compares what a
matrix became with what it was. FOLDER needs 9 GB and is left empty.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import psutil

from bitwright.compiler.hugging_face.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "null"))
from checkpoints import CheckpointSizes, write_checkpoint

MB = 1 << 20
LIMIT_MB = 6 * 1024
TOKENS = 8
PAUSE_S = 0.2
DOWN = "ffn_down"
COMMAND = "import sys; from bitwright.compiler.cli.app import main; sys.exit(main(sys.argv[1:]))"


@dataclass(frozen=True)
class Peak:
    """What a process took at most, in MB.

    Attributes:
        anonymous: Memory of its own.
        files: Pages of mapped files, which the system may take back.
        total: Largest sum of both at one time: of a process by itself, however short.
        seconds: Wall time.
    """

    anonymous: float
    files: float
    total: float
    seconds: float


def watched(command: Sequence[str]) -> Peak:
    """Run a command and sample its memory and that of its children.

    Raises:
        SystemExit: It failed.
    """
    began = time.perf_counter()
    process = subprocess.Popen(command)
    anonymous = files = total = 0.0
    while process.poll() is None:
        own, mapped = _memory(process.pid)
        anonymous, files = max(anonymous, own), max(files, mapped)
        total = max(total, own + mapped, _most_resident(process.pid))
        time.sleep(PAUSE_S)
    if process.returncode:
        sys.exit(f"{' '.join(command[:4])} ... ended with {process.returncode}")
    return Peak(anonymous / MB, files / MB, total / MB, time.perf_counter() - began)


def _memory(pid: int) -> tuple[float, float]:
    try:
        main = psutil.Process(pid)
        found = [p.memory_info() for p in (main, *main.children(recursive=True))]
    except psutil.Error:
        return 0.0, 0.0
    return sum(m.rss - m.shared for m in found), sum(m.shared for m in found)


def _most_resident(pid: int) -> float:
    """Return what the kernel saw a process take at most; 0 where it does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def sizes_of(options: argparse.Namespace) -> CheckpointSizes:
    """Return the decoder that was asked for."""
    return CheckpointSizes(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        key_heads=options.key_heads,
        feed_forward=options.feed_forward,
        vocabulary=options.vocabulary,
        positions=2048,
        tied=False,
    )


def half_bytes(sizes: CheckpointSizes) -> tuple[int, int]:
    """Return the bytes of the whole model and of one layer in 16 bits."""
    head = sizes.width // sizes.heads
    attention = 2 * sizes.width * sizes.width + 2 * sizes.width * sizes.key_heads * head
    layer = 2 * (attention + 3 * sizes.width * sizes.feed_forward)
    return layer * sizes.layers + 2 * 2 * sizes.vocabulary * sizes.width, layer


def generated(path: Path, prompt: Sequence[int]) -> list[int]:
    """Return tokens that the model generates, each the most probable one.

    Raises:
        SystemExit: A logit is not finite.
    """
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    pasts = [i for i in session.get_inputs() if i.name.startswith("past_")]
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    caches = {p.name: np.zeros((1, p.shape[1], 0, p.shape[3]), kinds[p.type]) for p in pasts}
    names = [o.name for o in session.get_outputs()]
    new, found = list(prompt), []
    for _ in range(TOKENS):
        values = session.run(names, {"input_ids": np.array([new], np.int64), **caches})
        outputs = dict(zip(names, values, strict=True))
        if not np.isfinite(outputs["logits"]).all():
            sys.exit("a logit is not finite")
        found.append(int(outputs["logits"][0, -1].argmax()))
        caches = {name: outputs[name.replace("past", "present")] for name in caches}
        new = found[-1:] if caches else [*new, found[-1]]
    return found


def rounding_error(folder: Path, quantized: Path, layer: int) -> tuple[float, float]:
    """Return the error of one matrix over its size, and what rounding to the nearest step would give.

    The matrix is the one behind the gated product of a layer; a step is the distance of two neighbouring values.
    """
    checkpoint = open_checkpoint(folder)
    weight = checkpoint.weight(f"blk.{layer}.{DOWN}.weight").T
    model = ir.load(quantized)
    products = [n for n in model.graph if n.op_type in ("MatMul", "MatMulNBits")]
    for node in products:
        source = node.inputs[1].producer() if node.inputs[1] is not None else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        stored, scale, zero = (v.const_value.numpy() for v in source.inputs)
        if stored.shape != weight.shape:
            continue
        group = source.attributes.get_int("block_size", 0)
        steps = np.repeat(scale, group, axis=0)
        values = (stored.astype(np.float32) - np.repeat(zero.astype(np.float32), group, axis=0)) * steps
        error = np.sqrt(np.mean((values - weight) ** 2) / np.mean(weight**2))
        if error < 0.5:  # another layer's matrix has nothing in common with this one
            return float(error), float(np.sqrt(np.mean(steps**2) / 12 / np.mean(weight**2)))
    sys.exit(f"no stored matrix of shape {weight.shape} is that of layer {layer}")


def run(options: argparse.Namespace) -> dict[str, object]:
    """Make, export, quantize, check; return what was measured."""
    work, sizes = options.work / "one-billion", sizes_of(options)
    folder, model, quantized = work / "folder", work / "model.onnx", work / "int4.onnx"
    work.mkdir(parents=True)
    try:
        write_checkpoint(folder, sizes, dtype="bfloat16", shards=2)
        whole, layer = half_bytes(sizes)
        print(
            f"{whole / 2e9:.2f} billion weights, {whole / MB:.0f} MB in 16 bits, a layer {layer / MB:.0f} MB"
        )
        tokens = np.random.default_rng(0).integers(0, sizes.vocabulary, options.samples * options.length)
        np.savez(work / "tokens.npz", calibration=tokens.astype(np.int32))
        bitwright = [sys.executable, "-c", COMMAND]
        export = ["export", folder, "-o", model, "--form", "cache", "--dtype", options.dtype]
        quantize = ["quantize", model, "-o", quantized, "-t", "host", "--stream", "quantized"]
        quantize += ["-d", f"{work / 'tokens.npz'}:calibration,window={options.length}"]
        quantize += ["--recipe", options.recipe, "--threads", options.threads]
        found: dict[str, object] = {}
        for name, arguments in (("export", export), ("quantize", quantize)):
            peak = watched([*bitwright, *map(str, arguments)])
            found[name] = asdict(peak)
            verdict = "below" if peak.total < whole / MB + 2 * layer / MB else "above"
            print(
                f"{name}: {peak.total:.0f} MB at most ({peak.anonymous:.0f} anonymous, {peak.files:.0f} of files), "
                f"{verdict} 16 bits and two layers ({(whole + 2 * layer) / MB:.0f} MB), {peak.seconds:.0f} s",
                flush=True,
            )
            if peak.total > LIMIT_MB:
                sys.exit(f"more than {LIMIT_MB} MB")
        error, nearest = rounding_error(folder, quantized, options.layers // 2)
        print(
            f"a matrix of layer {options.layers // 2}: error {error:.4f} of its size, "
            f"by the rounding steps alone {nearest:.4f}"
        )
        files = {p.name: p.stat().st_size for p in work.iterdir() if p.name.startswith("int4")}
        found |= {"generated": generated(quantized, tokens[:16].tolist()), "error": error, "files": files}
        print(f"generated {found['generated']}; files {files}")
        return found
    finally:
        if not options.keep:
            shutil.rmtree(work)


def main() -> None:
    """Read the options, run, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--feed-forward", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample, as windows are cut")
    parser.add_argument("--recipe", default="w4")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    print(json.dumps(run(options), indent=1))


if __name__ == "__main__":
    main()
