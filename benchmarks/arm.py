"""Executed instructions of the compiled artifact against ONNX Runtime for aarch64, both under qemu, one thread.

usage: BITWRIGHT_ZOO=... python benchmarks/arm.py --cache FOLDER [--work FOLDER] [--profile NAME ...] [MODEL ...]

One inference is the difference of runs of 2n and n inferences, over n. The rival executes the same Q/DQ model file with
the profile's session options; two further columns compare with a Q/DQ model planned for it and with the float model. Of
its counts, 0.02 million are Python's and a session's own. Instructions are counted, not timed: they say nothing of
caches, and little of latency.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import numpy as np
from arm_rival import CPUS, count, prepare
from zoo import Feeds, model_named

from bitwright.compiler.deploy import quantize
from bitwright.compiler.graph.saving import save_model
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, config_for
from bitwright.compiler.pipeline import compile_model
from bitwright.passes.normalize import specialize
from bitwright.targets.arm_cpu.counting import count_inference
from bitwright.targets.loader import load_profile

TOKENS = 32
MODELS = ("resnet8_cifar10", "vww_mobilenet", "minilm_l6")
SAMPLES = 32


def samples(name: str) -> tuple[list[Feeds], dict[str, int]]:
    """Return calibration samples, some of them of the shape to compile for, and that shape's free sizes."""
    found = list(model_named(name).samples())[:SAMPLES]
    if name != "minilm_l6":
        return found, {}
    sized = [{key: np.resize(array, (1, TOKENS)) for key, array in sample.items()} for sample in found[:8]]
    return found + sized, {"N": 1, "T": TOKENS}


def rival_models(name: str, profile: str, work: Path) -> dict[str, Path]:
    """Write the rival's other forms of a model: planned for ONNX Runtime, and float; both with fixed sizes."""
    import onnx_ir as ir

    data, dims = samples(name)
    source = model_named(name).path
    planned = work / "planned.onnx"
    quantize(Options(model=source, target=profile, data=data, dims=dims, output=planned, gate=False))
    found = {"planned": work / "planned-static.onnx", "float": work / "float-static.onnx"}
    for key, path in (("planned", planned), ("float", source)):
        model = ir.load(path)
        specialize(model, dims)
        save_model(model, found[key])
    return found


def row(name: str, profile_name: str, cache: Path, work: Path) -> tuple[str, float]:
    """Count one model on one processor; returns the table's row and the ratio."""
    profile, cpu = load_profile(profile_name), CPUS[profile_name]
    data, dims = samples(name)
    options = Options(
        model=model_named(name).path, target=profile_name, data=data, dims=dims, output=work / "out"
    )
    bundle = compile_model(options)
    assert bundle is not None
    inputs = bundle.path / "golden/inputs_0.npz"
    with np.load(inputs) as archive:
        feeds = {key: archive[key] for key in archive.files}
    ours = count_inference(bundle.path, feeds, profile).instructions
    config = config_for(profile.runtimes.onnxruntime)
    others = rival_models(name, profile_name, work)
    same = count(cache, cpu, bundle.path / "lib/model.static.onnx", inputs, config)
    planned = count(cache, cpu, others["planned"], inputs, config)
    plain = count(cache, cpu, others["float"], inputs, SessionConfig())
    shape = f" ({TOKENS} tokens)" if dims else ""
    cells = [f"{name}{shape}", profile_name, f"{ours / 1e6:.2f}", f"{same / 1e6:.2f}", f"{ours / same:.2f}"]
    cells += [f"{ours / planned:.2f}", f"{ours / plain:.2f}"]
    return "| " + " | ".join(cells) + " |", ours / same


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, required=True, help="interpreter and wheels are kept here (150 MB)"
    )
    parser.add_argument("--profile", action="append", choices=sorted(CPUS))
    parser.add_argument("model", nargs="*", default=MODELS)
    given = parser.parse_args()
    prepare(given.cache.resolve())
    print("| model | profile | artifact, million | ONNX Runtime, same Q/DQ, million | ratio ", end="")
    print("| / planned for ONNX Runtime | / float in ONNX Runtime |\n|" + " --- |" * 7)
    for profile in given.profile or CPUS:
        ratios = []
        for name in given.model:
            with tempfile.TemporaryDirectory() as work:
                line, ratio = row(name, profile, given.cache.resolve(), Path(work))
            ratios.append(ratio)
            print(line, flush=True)
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"| geometric mean | {profile} | | | {mean:.2f} | | |", flush=True)


if __name__ == "__main__":
    main()
