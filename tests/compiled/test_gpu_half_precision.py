"""Half precision in artifacts for GPUs: which products tensor cores compute, and how far results are off."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from bitwright import Bundle
from bitwright.compiler.errors import BitwrightError
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.loader import load_profile
from bitwright.targets.nvidia_gpu.execution import EXECUTED, HALF_PRODUCT, why_not_executable

pytestmark = [
    pytest.mark.skipif(
        shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists(),
        reason="nvcc is not installed",
    ),
    pytest.mark.skipif(why_not_executable() is not None, reason=str(why_not_executable())),
]
HALF, SINGLE, SUBNORMAL = 2.0**-11, 2.0**-24, 2.0**-25
Arrays = dict[str, np.ndarray]

# On tensor cores: a with its bias and Relu, b with a transposed weight, c of a transposed matrix.
# Not: d has an odd reduction, e two rows, f two activations. What g adds up exceeds what half precision holds.
MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2,10,40] x, float[12,32] u, float[12,33] z, float[2,40] v, float[1,4,6,6] i)
  => (float[2,10,24] a, float[12,20] b, float[2,40,16] c, float[12,50] d, float[2,24] e, float[2,10,10] f,
      float[2,10] g, float[1,8,6,6] h) {
  a0 = MatMul(x, wa)
  a1 = Add(a0, ba)
  a = Relu(a1)
  b = Gemm<transB=1>(u, wb, bb)
  xt = Transpose<perm=[0,2,1]>(x)
  c = MatMul(xt, wc)
  d = MatMul(z, wd)
  e = MatMul(v, wa)
  f = MatMul(x, xt)
  large = Mul(x, thousands)
  g = ReduceMean<axes=[2], keepdims=0>(large)
  h = Conv<pads=[1,1,1,1]>(i, wh)
}"""
SIZES = {
    "wa": (40, 24),
    "ba": (24,),
    "wb": (20, 32),
    "bb": (20,),
    "wc": (10, 16),
    "wd": (33, 50),
    "wh": (8, 4, 3, 3),
}
INPUTS = {"x": (2, 10, 40), "u": (12, 32), "z": (12, 33), "v": (2, 40), "i": (1, 4, 6, 6)}
ON_TENSOR_CORES = 3
THOUSANDS = 4000.0


def weights() -> Arrays:
    random = np.random.default_rng(0)
    found = {name: (random.normal(size=size) / 4).astype(np.float32) for name, size in SIZES.items()}
    return {**found, "thousands": np.full(1, THOUSANDS, np.float32)}


def feeds(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return {name: np.abs(random.normal(size=shape)).astype(np.float32) for name, shape in INPUTS.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    proto = parse_model(MODEL)
    for name, array in weights().items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("model") / "halves.onnx"
    onnx.save(proto, path)
    return path


def compiled(model: Path, out: Path, target: str, recipe: str = "fp16") -> Bundle:
    bundle = compile_model(
        Options(model=model, target=target, data=[feeds(1), feeds(2)], output=out, recipe=recipe, golden=1)
    )
    assert bundle is not None
    return bundle


@pytest.fixture(scope="module")
def ada(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(model, tmp_path_factory.mktemp("ada") / "out", "nvidia-ada")


def halves(arrays: Arrays) -> Arrays:
    """Return arrays as half precision holds them, for exact arithmetic."""
    return {name: array.astype(np.float16).astype(np.float64) for name, array in arrays.items()}


def dot_products(arrays: Arrays) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return left, right and bias of every product."""
    v, none = halves({**weights(), **arrays}), np.zeros(1)
    image = np.pad(v["i"][0], ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3), axis=(1, 2))
    return {
        "a": (v["x"], v["wa"], v["ba"]),
        "b": (v["u"], v["wb"].T, v["bb"]),
        "c": (v["x"].swapaxes(1, 2), v["wc"], none),
        "d": (v["z"], v["wd"], none),
        "e": (v["v"], v["wa"], none),
        "f": (v["x"], v["x"].swapaxes(1, 2), none),
        "h": (windows.transpose(1, 2, 0, 3, 4).reshape(36, 36), v["wh"].reshape(8, 36).T, none),
    }


@pytest.mark.parametrize("policy", ["0", "3"], ids=["late", "early"])
def test_every_product_is_rounded_once(ada: Bundle, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    """At most K + 1 float32 roundings in any order of the sum, then one to half precision."""
    monkeypatch.setenv("BITWRIGHT_EMULATION_POLICY", policy)
    inputs = feeds(3)
    outputs = ada.run(inputs)
    for name, (left, right, bias) in dot_products(inputs).items():
        exact = left @ right + bias
        magnitudes = np.abs(left) @ np.abs(right) + np.abs(bias)
        bound = (left.shape[-1] + 2) * SINGLE * magnitudes + 1.01 * HALF * np.abs(exact) + SUBNORMAL
        found = outputs[name].reshape(8, 36).T if name == "h" else outputs[name]
        wanted = np.maximum(exact, 0) if name == "a" else exact
        assert np.all(np.abs(found - wanted) <= bound), name
        np.testing.assert_array_equal(found, found.astype(np.float16))


def test_sums_beyond_half_precision_do_not_overflow(ada: Bundle) -> None:
    inputs = feeds(4)
    large = THOUSANDS * halves(inputs)["x"]
    assert large.max() < np.finfo(np.float16).max < large.sum(-1).min()
    # The products and their mean are rounded to half precision, float32 adds far less.
    np.testing.assert_allclose(ada.run(inputs)["g"], large.mean(-1), rtol=2.01 * HALF, atol=0)


def kernels(bundle: Bundle) -> dict[str, str]:
    """Return the source of every kernel."""
    _, *parts = (bundle.path / "lib" / "kernels.cu").read_text().split('extern "C" __global__')
    bodies = [part for part in parts if "{" in part]
    return {re.search(r"(\w+)_kernel\(", body).group(1): body for body in bodies if _defines(body)}  # type: ignore[union-attr]


def _defines(part: str) -> bool:
    return not part.partition("{")[0].rstrip().endswith(";")


def test_products_with_constant_weights_run_on_tensor_cores(ada: Bundle) -> None:
    found = kernels(ada)
    multiplying = {name for name, body in found.items() if "bw_mma_f16(" in body}
    assert multiplying == {name for name in found if name.startswith(HALF_PRODUCT)}
    assert len(multiplying) == ON_TENSOR_CORES
    report = ada.report["verification"]
    assert report["executed"] == EXECUTED and report["passed"]
    measured = {m["label"]: m["value"] for m in report["measurements"]}
    assert measured["Half-precision products"] == f"{ON_TENSOR_CORES} kernels on tensor cores"


def test_what_the_profile_does_not_compute_in_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match="bf16"):
        compiled(model, tmp_path / "out", "nvidia-ada", "bf16")


def test_without_tensor_cores_for_halves_products_add_in_float32() -> None:
    import tvm
    from tvm import relax

    from bitwright.targets.nvidia_gpu.half_products import use_half_kernels

    profile = load_profile("nvidia-ada")
    rows = tuple(row for row in profile.compute if row.name != "mma_f16")
    x = relax.Var("x", relax.TensorType((16, 32), "float16"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            weight = relax.const(np.ones((32, 16), np.float16))
            y = builder.emit_output(relax.op.matmul(x, weight))
        builder.emit_func_output(y)
    for changed, functions in ((profile, 1), (profile.model_copy(update={"compute": rows}), 0)):
        module = use_half_kernels(builder.get(), changed)
        made = [f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
        assert len(made) == functions
        assert ('out_dtype="float32"' in module.script()) == (functions == 0)
