"""The compiled int8 artifact against its own fp32 build and against ONNX Runtime, one thread, taking turns.

usage: BITWRIGHT_ZOO=... python benchmarks/artifact_speed.py [MODEL[@NAME=SIZE...] ...]

Each figure is the best thread CPU time of one call over the rounds, inputs bound in advance.
"""

from __future__ import annotations

import os

os.environ["TVM_NUM_THREADS"] = "1"  # read when tvm is imported

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import tvm
from turns import best_times
from tvm.runtime.vm import VirtualMachine
from zoo import Feeds, ZooModel, model_named

from bitwright.compiler.compilation import Compilation
from bitwright.compiler.lower.compile import compile_float, compile_module
from bitwright.compiler.lower.relax_module import build_module
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, config_for, open_session
from bitwright.compiler.pipeline import FRONT
from bitwright.compiler.program.extract import extract_program
from bitwright.passes.normalize import specialize
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

MLP_TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
mlp (float[M,384] x) => (float[M,384] y)
{
  h = Gemm(x, up, up_bias)
  r = Relu(h)
  y = Gemm(r, down, down_bias)
}
"""
DEFAULT = (
    "mlp@M=1",
    "mlp@M=32",
    "mlp@M=128",
    "resnet8_cifar10",
    "kws_dscnn",
    "vww_mobilenet",
    "ad_autoencoder",
    "minilm_l6@N=1@T=64",
    "ppocr_rec",
    "tinylm",
)
ROUNDS = 15


def mlp(folder: Path, rows: int) -> ZooModel:
    """Return minilm's feed-forward shapes (384 -> 1536 -> 384) with random weights, as a model of its own."""
    random = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MLP_TEXT)
    shapes = {"up": (384, 1536), "up_bias": (1536,), "down": (1536, 384), "down_bias": (384,)}
    for name, shape in shapes.items():
        weight = random.normal(0, 0.05, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(proto, folder / "model.onnx")
    samples = [{"x": random.normal(size=(rows, 384)).astype(np.float32)} for _ in range(8)]
    return GeneratedModel("mlp", "", float, True, lambda: iter(samples), lambda _: 0.0, folder / "model.onnx")


@dataclass(frozen=True)
class GeneratedModel(ZooModel):
    """A model that this script made."""

    file: Path

    @property
    def path(self) -> Path:
        """The model file."""
        return self.file


def sized(sample: Feeds, dims: Mapping[str, int]) -> Feeds:
    """Return a token sample repeated to the wanted length."""
    if "T" not in dims:
        return sample
    return {name: np.resize(array, (1, dims["T"])) for name, array in sample.items()}


def prepared(model: ZooModel, dims: dict[str, int]) -> Compilation:
    """Run the phases up to the specialised Q/DQ model."""
    samples = list(model.samples())[:32]
    data = samples + [sized(s, dims) for s in samples[:8]] if dims else samples
    options = Options(model=model.path, target="host", data=data, dims=dims)
    c = Compilation(options, load_profile("host"))
    for _, phase in FRONT:
        phase(c, [])
    return c


def tvm_call(executable: Any, feeds: Feeds, order: list[str], folder: Path) -> Callable[[], object]:
    """Return a call of a compiled module with bound inputs."""
    library = folder / f"{len(list(folder.iterdir()))}.so"
    executable.export_library(str(library))
    machine = VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    arguments = [tvm.runtime.tensor(feeds[name]) for name in order]
    return lambda: machine["main"](*arguments)


def ort_call(model: ir.Model, config: SessionConfig, feeds: Feeds) -> Callable[[], object]:
    """Return a call of an ONNX Runtime session."""
    session = open_session(model, config)
    return lambda: session.run(None, feeds)


def row(spec: str) -> str:
    """Measure one model."""
    name, *sizes = spec.split("@")
    dims = {key: int(size) for key, size in (pair.split("=") for pair in sizes)}
    if name == "mlp":
        made = tempfile.TemporaryDirectory()
        c = prepared(mlp(Path(made.name), dims["M"]), dims)
    else:
        c = prepared(model_named(name), dims)
    assert c.static is not None and c.model is not None
    backend, profile = backend_for(c.profile.family), c.profile
    plain = c.model.clone()
    specialize(plain, c.dims)
    integer = build_module(extract_program(c.static), profile, backend.dot_kernel)
    target = backend.tvm_target(profile)
    feeds = c.golden[-1]
    order = [v.name or "" for v in c.static.graph.inputs]
    with tempfile.TemporaryDirectory() as work:
        calls = [
            tvm_call(compile_module(integer.ir_module, target), feeds, order, Path(work)),
            tvm_call(compile_float(plain, target), feeds, order, Path(work)),
            ort_call(plain, SessionConfig(), feeds),
            ort_call(c.static, config_for(profile.runtimes.onnxruntime), feeds),
        ]
        ours, own_float, ort_float, ort_int = best_times(calls, ROUNDS)
    shape = ", ".join(f"{k}={v}" for k, v in c.dims.items())
    return (
        f"| {name} | {shape} | {ours * 1e6:.0f} | {ours / own_float:.2f} | {ours / ort_float:.2f} "
        f"| {ours / ort_int:.2f} |"
    )


def main() -> None:
    """Print the table."""
    print(
        "| model | shape | artifact us | / own fp32 build | / ONNX Runtime fp32 | / ONNX Runtime, same Q/DQ |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for spec in sys.argv[1:] or DEFAULT:
        print(row(spec), flush=True)


if __name__ == "__main__":
    main()
