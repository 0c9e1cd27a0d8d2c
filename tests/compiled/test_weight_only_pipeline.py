"""``compile`` with weight-only recipes: the artifact executes grouped weights, equal to the interpreter bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from bitwright.compiler.bundle.bundle import Bundle
from bitwright.compiler.errors import UsageError
from bitwright.compiler.lower.kernel_table import load_table
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model

MODEL = """<ir_version: 9, opset_import: ["": 17]>
feed_forward (float[m, 70] x) => (float[m, 37] y)
{
  [up] h = MatMul(x, up_weight)
  [up_bias] b = Add(h, up_shift)
  [gate] s = Sigmoid(b)
  [silu] t = Mul(b, s)
  [down] y = Gemm(t, down_weight, down_shift)
}
"""
SHAPES = {"up_weight": (70, 96), "up_shift": (96,), "down_weight": (96, 37), "down_shift": (37,)}
# Decibels of what is left of random normal weights; a wrong group, scale or zero point leaves nothing.
LEAST_DB = {"w4": 15, "w2": 4, "ternary": 3}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    proto = onnx.parser.parse_model(MODEL)
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        array = random.normal(0, 0.1, shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(proto, path)
    return path


def samples(rows: int = 3) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.normal(size=(rows, 70)).astype(np.float32)} for _ in range(16)]


def compiled(model: Path, out: Path, recipe: str, target: str = "host") -> Bundle:
    made = compile_model(Options(model=model, data=samples(), output=out, target=target, recipe=recipe))
    assert made is not None
    return made


def operations(bundle: Bundle) -> list[str]:
    return [c.operation for c in load_table((bundle.path / "lib/kernels.json").read_text())]


# The other formats differ in bits and zero points only, which the tests of extraction and kernels go through.
@pytest.mark.parametrize(("recipe", "target"), [("w4", "host"), ("ternary", "host"), ("w2", "x86-avx2")])
def test_recipes_reach_the_artifact(model_path: Path, tmp_path: Path, recipe: str, target: str) -> None:
    bundle = compiled(model_path, tmp_path / "out", recipe, target)
    assert operations(bundle) == ["WeightOnlyDot"] * 2
    notes = [note for phase in bundle.report["phases"] for note in phase["notes"]]
    assert any(n.startswith("2 products of grouped weights round their activations to 8 bits") for n in notes)
    verification = bundle.report["verification"]
    if bundle.why_not_executable():
        pytest.skip(bundle.why_not_executable() or "")
    assert (verification["passed"], verification["executed"]) == (True, "native")
    assert verification["calls"] == 2 * verification["sets"] > 0
    plain = compute_float(model_path, samples()[0]["x"])
    noise = bundle.run(samples()[0])["y"] - plain
    assert 10 * np.log10((plain**2).mean() / (noise**2).mean()) > LEAST_DB[recipe]


def compute_float(model: Path, x: np.ndarray) -> np.ndarray:
    arrays = {
        t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in onnx.load(model).graph.initializer
    }
    hidden = x @ arrays["up_weight"] + arrays["up_shift"]
    active = hidden / (1 + np.exp(-hidden))
    return np.asarray(active @ arrays["down_weight"] + arrays["down_shift"])


@pytest.mark.parametrize("recipe", ["nf4", "bf16"])
def test_formats_without_a_kernel_are_refused_with_alternatives(
    model_path: Path, tmp_path: Path, recipe: str
) -> None:
    with pytest.raises(UsageError, match=f"no kernel for the format {recipe}") as caught:
        compiled(model_path, tmp_path / "out", recipe)
    assert "w4" in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.zoo
@pytest.mark.skipif("BITWRIGHT_ZOO" not in os.environ, reason="BITWRIGHT_ZOO names no model collection")
def test_decoding_with_a_key_value_cache(tmp_path: Path) -> None:
    """One token behind 16 others; every product of a constant weight is a kernel of grouped weights."""
    from zoo import folder

    random = np.random.default_rng(0)
    caches = {
        f"past_{k}_{part}": random.normal(size=(1, 2, 16, 32)).astype(np.float32)
        for k in range(6)
        for part in "kv"
    }
    data = [{"input_ids": np.array([[token]], np.int64), **caches} for token in (5, 700, 1500, 1900)]
    model = folder("tinylm") / "model_kv.onnx"
    bundle = compile_model(
        Options(model=model, data=data, output=tmp_path / "out", target="host", recipe="w4")
    )
    assert bundle is not None
    # Query, key, value, output, gate, up and down of six layers, and the head.
    assert operations(bundle).count("WeightOnlyDot") == 6 * 7 + 1
    if bundle.why_not_executable():
        pytest.skip(bundle.why_not_executable() or "")
    assert bundle.report["verification"]["passed"] is True
    ours, theirs = bundle.run(data[1]), bundle.run(data[1], "ort")
    for name, value in theirs.items():
        # ONNX Runtime rounds activations to 8 bits in the same blocks.
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1e-3 * np.abs(value).max())
