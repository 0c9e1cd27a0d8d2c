"""Normalization and specialization of real and of awkward models: same outputs, nothing dynamic left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from pass_harness import assert_equal_outputs, count_ops, run_onnxruntime

from bitwright.passes.normalize import normalize, specialize

pytestmark = pytest.mark.zoo

BOUND = 1e-4  # float32 rounding through up to fifty layers, relative to the largest output value
HALF_BOUND = 2e-2  # the original computes in float16 (2**-11 a rounding, nine layers)
INDEX_OPS = {
    "Shape",
    "Size",
    "Range",
    "ConstantOfShape",
    "Constant",
    "Identity",
    "Where",
    "Equal",
    "LessOrEqual",
}

Feeds = dict[str, np.ndarray]


def zoo() -> Path:
    folder = os.environ.get("BITWRIGHT_ZOO")
    if not folder:
        pytest.skip("BITWRIGHT_ZOO does not name the folder of real models")
    return Path(folder)


def data(name: str) -> dict[str, np.ndarray]:
    with np.load(zoo() / name / "data.npz") as file:
        return {key: file[key] for key in file.files}


def minilm() -> Path:
    for path in (zoo() / "minilm_l6" / "model.onnx", Path(os.environ.get("BITWRIGHT_MINILM", "-"))):
        if path.is_file():
            return path
    pytest.skip("no minilm_l6/model.onnx in the zoo and BITWRIGHT_MINILM names none: run its build_model.py")


def kws() -> Feeds:
    z = data("kws_dscnn")
    return {"input": (z["x"][:4].astype(np.float32) - z["zp"]) * z["scale"]}


def images(name: str, divisor: float = 1.0) -> Callable[[], Feeds]:
    return lambda: {"input": data(name)["x"][:2].astype(np.float32) / np.float32(divisor)}


def spectrum() -> Feeds:
    return {"input": np.stack([data("ad_autoencoder")["frames"][k : k + 5].reshape(-1) for k in range(4)])}


def tinylm() -> Feeds:
    return {"input_ids": data("tinylm")["test"][None, :64].astype(np.int64)}


def ppocr() -> Feeds:
    z = data("ppocr_rec")
    width = int(z["w"][0])
    image = z["pix"][: 48 * width * 3].reshape(48, width, 3).astype(np.float32)
    return {"x": ((image / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]}


def embedding() -> Feeds:
    z = data("minilm_l6")
    length = np.minimum(z["len"][:2], 32)
    mask = (np.arange(32)[None] < length[:, None]).astype(np.int64)
    return {"input_ids": z["ids"][:2, :32].astype(np.int64), "attention_mask": mask}


def speech() -> Feeds:
    audio = data("silero_vad")["audio"].astype(np.float32) / 32767
    state = np.zeros((1, 1, 128), np.float32)
    return {"input": np.stack([audio[k * 512 : k * 512 + 576] for k in range(8)]), "h": state, "c": state}


def speech_streaming() -> Feeds:
    frame = speech()["input"][3:4]
    return {"input": frame, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000, np.int64)}


MODELS: dict[str, tuple[Callable[[], Feeds], int]] = {
    "kws_dscnn/model": (kws, 23),
    "resnet8_cifar10/model": (images("resnet8_cifar10"), 24),
    "vww_mobilenet/model": (images("vww_mobilenet", 255.0), 59),
    "ad_autoencoder/model": (spectrum, 19),
    "ppocr_rec/model": (ppocr, 287),
    "tinylm/model": (tinylm, 501),
    "minilm_l6/model": (embedding, 344),
    "silero_vad/model": (speech, 27),
    "silero_vad/silero_vad": (speech_streaming, 2),
    "kws_dscnn/model_tflite_int8_qdq": (kws, 69),
}


def load(name: str) -> ir.Model:
    return ir.load(minilm() if name == "minilm_l6/model" else zoo() / f"{name}.onnx")


@pytest.mark.parametrize("name", MODELS)
def test_normal_form_computes_the_same(name):
    feeds, nodes = MODELS[name][0](), MODELS[name][1]
    before = run_onnxruntime(load(name), feeds)
    model = load(name)
    normalize(model)
    assert len(model.graph) <= nodes
    assert not {"BatchNormalization", "Identity", "Constant"} & set(count_ops(model))
    assert_equal_outputs(before, run_onnxruntime(model, feeds), BOUND)
    assert normalize(model).changed == 0


NASTY: dict[str, Callable[[], Feeds]] = {
    "bilstm_gru": lambda: {"x": rng(5, 2, 6)},
    "conv_zoo_dynamic_hw": lambda: {"x": rng(2, 4, 9, 11)},
    "if_nested_subgraph_weights": lambda: {"x": rng(2, 16), "flag": np.array(True)},
    "kws_constants_identity_unnamed": kws,
    "kws_external_data": kws,
    "local_functions": lambda: {"x": rng(3, 16)},
    "loop_outer_scope_weights": lambda: {"x": rng(2, 16), "trips": np.array(3, np.int64)},
    "opset23_attention_rope_rmsnorm": lambda: {"x": rng(2, 5, 64), "pos": np.tile(np.arange(5), (2, 1))},
    "outlier_and_dead_channels": lambda: {"x": rng(3, 16)},
    "resnet8_qoperator_u8s8": images("resnet8_cifar10"),
    "tied_shared_initializers": lambda: {"ids": np.array([[1, 2, 3], [4, 5, 49]])},
}


def rng(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", NASTY)
def test_awkward_models_compute_the_same(name):
    path, feeds = zoo() / "nasty" / f"{name}.onnx", NASTY[name]()
    variants = [feeds, feeds | {"flag": np.array(False)}] if "flag" in feeds else [feeds]
    before = [run_onnxruntime(in_memory(ir.load(path)), f) for f in variants]
    model = in_memory(ir.load(path))
    normalize(model)
    for old, f in zip(before, variants, strict=True):
        assert_equal_outputs(old, run_onnxruntime(model, f), BOUND)
    assert normalize(model).changed == 0


def in_memory(model: ir.Model) -> ir.Model:
    """Read external weights: ONNX Runtime gets the model as bytes, without a folder."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
    return model


def test_float16_keywords_are_computed_in_float32():
    path = zoo() / "nasty" / "kws_fp16.onnx"
    feeds = {"input": kws()["input"].astype(np.float16)}
    model = ir.load(path)
    normalize(model)
    assert_equal_outputs(run_onnxruntime(ir.load(path), feeds), run_onnxruntime(model, feeds), HALF_BOUND)
    assert count_ops(model)["Cast"] == 2


def test_a_custom_operator_passes_through():
    model = ir.load(zoo() / "nasty" / "unknown_custom_op.onnx")
    normalize(model)
    assert count_ops(model) == {"MatMul": 2, "FancyGate": 1}


def test_tied_weights_stay_tied():
    model = ir.load(zoo() / "nasty" / "tied_shared_initializers.onnx")
    before = set(model.graph.initializers)
    normalize(model)
    assert set(model.graph.initializers) <= before, "no weight was duplicated"


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        ("minilm_l6/model", {"N": 2, "T": 32}),
        ("tinylm/model", {"N": 1, "T": 64}),
        ("ppocr_rec/model", {"DynamicDimension.0": 1, "DynamicDimension.1": None}),
        ("kws_dscnn/model_tflite_int8_qdq", {"N": 4}),
    ],
)
def test_specialized_models_are_static(name, dims):
    feeds = MODELS[name][0]()
    dims = {key: size if size is not None else feeds["x"].shape[3] for key, size in dims.items()}
    before = run_onnxruntime(load(name), feeds)
    model = load(name)
    normalize(model)
    quantizers = [n.name for n in model.graph if n.op_type.endswith("QuantizeLinear")]
    result = specialize(model, dims)
    assert not [note for note in result.notes if note.startswith("specialize")]
    assert not INDEX_OPS & set(count_ops(model))
    assert quantizers == [n.name for n in model.graph if n.op_type.endswith("QuantizeLinear")]
    assert_equal_outputs(before, run_onnxruntime(model, feeds), BOUND)
    assert specialize(model, dims).changed == 0


def test_an_opset_that_knows_no_attention_is_not_reached_backwards():
    model = ir.load(zoo() / "nasty" / "opset23_attention_rope_rmsnorm.onnx")
    normalize(model, opset=21)
    assert model.opset_imports[""] == 23
