"""A small network with a residual addition and a depthwise convolution, and how the tests train it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from bitwright.compiler.options import Options
from bitwright.compiler.training.request import Precision, Training

TARGET = "x86-avx512-vnni"
TEXT = """
<ir_version: 10, opset_import: ["" : 17]>
net (float[N, 3, 8, 8] x) => (float[N, 5] y)
<float[1] w0 = {0}, float[1] b0 = {0}, float[1] w1 = {0}, float[1] b1 = {0}, float[1] w2 = {0},
 float[1] w3 = {0}, float[1] b3 = {0}>
{
  c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
  r0 = Relu (c0)
  c1 = Conv <pads = [1, 1, 1, 1], group = 8> (r0, w1, b1)
  r1 = Relu (c1)
  c2 = Conv (r1, w2)
  s = Add (c2, r0)
  r2 = Relu (s)
  p = GlobalAveragePool (r2)
  f = Flatten (p)
  l = Gemm (f, w3, b3)
  y = Softmax (l)
}
"""
SHAPES = {
    "w0": (8, 3, 3, 3),
    "b0": (8,),
    "w1": (8, 1, 3, 3),
    "b1": (8,),
    "w2": (8, 8, 1, 1),
    "w3": (8, 5),
    "b3": (5,),
}
SAMPLES = 48


def write(folder: Path) -> tuple[Path, np.ndarray]:
    """Write model and samples; return the model's path and the samples."""
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    rng = np.random.default_rng(5)
    for name, shape in SHAPES.items():
        array = rng.normal(0, 0.5, shape).astype(np.float32)
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        model.graph.initializers[name].shape = ir.Shape(shape)
    path = folder / "model.onnx"
    onnx.save(ir.to_proto(model), path)
    x = rng.normal(0, 1, (SAMPLES, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "x.npz", x=x)
    np.savez(folder / "labels.npz", y=rng.integers(0, 5, SAMPLES))
    return path, x


def options(folder: Path, output: str = "trained.onnx", **changes: object) -> Options:
    """Return options for the model in a folder."""
    values = {"target": TARGET, "data": str(folder / "x.npz"), "output": folder / output, **changes}
    return Options(folder / "model.onnx", **values)  # type: ignore[arg-type]


def training(weights: int | str | None = 2, activations: int | None = 4, **changes: object) -> Training:
    """Return a short training of 2-bit weights and 4-bit activations in all layers."""
    values = {"epochs": 4.0, "batch": 8, "save_every": 5, "held": 0.2, **changes}
    return Training(Precision(weights, activations, everywhere=True), **values)  # type: ignore[arg-type]
