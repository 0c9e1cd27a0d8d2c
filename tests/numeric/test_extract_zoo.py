"""Int8 models that another tool wrote, end to end against ONNX Runtime."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from bitwright.compiler.interpret.island import OrtRunner
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.program.extract import extract_program
from bitwright.compiler.program.ops import FloatIsland

ZOO = os.environ.get("BITWRIGHT_ZOO", "")
pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(not ZOO, reason="BITWRIGHT_ZOO does not name the folder of real models"),
]
SAMPLES = 100
# Step kinds each model must become; Softmax is the only float part.
CLASSIFIER = {"QGemm": 1, "QPool": 1, "Move": 2, "Quantize": 2, "Dequantize": 2, "FloatIsland": 1}
STEPS = {
    "kws_dscnn": {"QConv": 9} | CLASSIFIER,
    "resnet8_cifar10": {"QConv": 9, "QAdd": 3} | CLASSIFIER,
    "vww_mobilenet": {"QConv": 27} | CLASSIFIER,
    "ad_autoencoder": {"QGemm": 10, "Quantize": 1, "Dequantize": 1},
}
# Output elements per thousand that may differ from ONNX Runtime's optimised graph. Zero where it runs integer
# kernels throughout; six of resnet8's convolutions and two of its additions stay float there.
DIFFERENT_PER_MILLE = {"kws_dscnn": 0, "resnet8_cifar10": 10, "vww_mobilenet": 0, "ad_autoencoder": 0}


def samples(name: str) -> np.ndarray:
    data = np.load(Path(ZOO) / name / "data.npz")
    if name == "kws_dscnn":
        return ((data["x"][:SAMPLES].astype(np.float32) - data["zp"]) * data["scale"]).astype(np.float32)
    if name == "ad_autoencoder":
        frames = data["frames"]
        return np.stack([frames[k : k + 5].reshape(-1) for k in range(SAMPLES)]).astype(np.float32)
    pixels = data["x"][:SAMPLES].astype(np.float32)
    return pixels / np.float32(255) if name == "vww_mobilenet" else pixels


def fixed_model(name: str) -> onnx.ModelProto:
    """Load the model and fix its batch to one."""
    model = onnx.load(Path(ZOO) / name / "model_tflite_int8_qdq.onnx")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def session(model: onnx.ModelProto, level: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", list(STEPS))
def test_other_tools_int8_model(name: str) -> None:
    model = fixed_model(name)
    program = extract_program(ir.from_proto(model))
    assert Counter(type(s).__name__ for s in program.steps) == STEPS[name], program.notes
    assert [s.nodes[0][:7] for s in program.steps if isinstance(s, FloatIsland)] in ([], ["softmax"])
    sessions = [session(model, level) for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")]
    runner, outputs, seconds = OrtRunner(), [], []
    for x in samples(name):
        feeds = {program.inputs[0]: x.reshape(program.tensor(program.inputs[0]).shape)}
        start = time.perf_counter()
        ours = run_program(program, feeds, float_runner=runner)[program.outputs[0]]
        seconds.append(time.perf_counter() - start)
        outputs.append([ours, *(s.run(None, feeds)[0] for s in sessions)])
    ours, unoptimised, optimised = (np.concatenate(column) for column in zip(*outputs, strict=True))
    agreement = (ours.argmax(1) == unoptimised.argmax(1)).mean()
    different = np.count_nonzero(ours != optimised)
    print(
        f"{name}: top-1 agreement {agreement:.2%}, {different} of {ours.size} outputs differ from optimised"
    )
    assert agreement >= 0.99
    assert different * 1000 <= DIFFERENT_PER_MILLE[name] * ours.size
    assert np.median(seconds) < 0.5
