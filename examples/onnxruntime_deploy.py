"""Quantize a model for ONNX Runtime, then load it the way an application does: the file and its session options.

usage: python examples/onnxruntime_deploy.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import bitwright

CLASSIFIER = """
<ir_version: 9, opset_import: ["": 17]>
classifier (float[N, 3, 32, 32] image, float[64, 3, 3, 3] w1, float[64, 64, 3, 3] w2, float[64, 10] w3)
        => (float[N, 10] scores) {
    a = Conv <pads = [1, 1, 1, 1]> (image, w1)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1]> (b, w2)
    d = Relu (c)
    e = GlobalAveragePool (d)
    f = Flatten (e)
    scores = MatMul (f, w3)
}
"""


def small_classifier(path: Path) -> None:
    """Write an image classifier with random weights."""
    model = onnx.parser.parse_model(CLASSIFIER)
    rng = np.random.default_rng(0)
    while len(model.graph.input) > 1:
        weight = model.graph.input.pop(1)
        shape = [dim.dim_value for dim in weight.type.tensor_type.shape.dim]
        values = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, path)


def open_deployed(model: Path, threads: int = 1) -> ort.InferenceSession:
    """Open a model with the options of the .session.json beside it."""
    settings = json.loads(model.with_suffix(".session.json").read_text())
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(
        ort.GraphOptimizationLevel, settings["graph_optimization_level"]
    )
    for key, value in settings["session_config_entries"].items():
        options.add_session_config_entry(key, value)
    skipped = settings["disabled_optimizers"] or None
    return ort.InferenceSession(model, options, providers=settings["providers"], disabled_optimizers=skipped)


def main() -> None:
    """Quantize, load, compare."""
    rng = np.random.default_rng(1)
    images = rng.normal(size=(32, 3, 32, 32)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        source, quantized = Path(folder, "classifier.onnx"), Path(folder, "classifier.int8.onnx")
        small_classifier(source)
        made = bitwright.quantize(source, target="host", data={"image": images[:16]}, output=quantized)
        before = ort.InferenceSession(source).run(None, {"image": images[16:]})[0]
        after = open_deployed(quantized).run(None, {"image": images[16:]})[0]
        operators = sorted({node.op_type for node in onnx.load(quantized).graph.node})
    print("operators:", " ".join(operators))
    print(f"time in ONNX Runtime: {made.report['timing']['onnxruntime']['ratio']:.2f} of the float model's")
    print(f"largest difference {np.abs(before - after).max():.4f} of scores up to {np.abs(before).max():.4f}")


if __name__ == "__main__":
    main()
