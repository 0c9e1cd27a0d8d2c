"""Every recipe end to end: it runs in ONNX Runtime and is as accurate as its bits allow, or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from bitwright.compiler.deploy import quantize
from bitwright.compiler.errors import UsageError
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.pipeline import compile_model
from bitwright.compiler.recipe.loader import load_recipe, recipe_names
from bitwright.targets.loader import load_profile

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
mlp (float[N,64] x) => (float[N,32] y)
{
  a = MatMul(x, wa)
  ab = Add(a, ba)
  ga = Tanh(ab)
  b = MatMul(ga, wb)
  gb = Relu(b)
  y = Gemm(gb, wc, bc)
}
"""
SHAPES = {"wa": (64, 128), "ba": (128,), "wb": (128, 128), "wc": (128, 32), "bc": (32,)}
TARGET = "x86-avx512-vnni"
# SQNR in dB that a format must reach here. Uniform rounding of b bits gives about 6 dB a bit less 7 for Gaussian
# weights; the bounds leave 6 dB for what adds up over three layers. 2 bits and fewer are not usable untrained.
LEAST_DB = {
    "int8": 28,
    "int8-nearest": 28,
    "int8-dynamic": 28,
    "int8-row": 28,
    "mixed": 28,  # within half the size of float
    "w4a8-mixed": 28,  # without a budget: as good as int8
    "short-mixed": 28,  # likewise; only 8 and 4 bits have kernels here
    "w8": 34,
    "w4": 16,
    "w4a8": 12,
    "nf4": 14,
    "w4-nearest": 14,
    "w4-mse": 15,
    "w4-awq": 15,
    "w4-awq-gptq": 16,
    "w4-symmetric": 16,
    "w4-k": 16,
    "w4-small": 16,
    "w3": 10,
    "w3-awq-gptq": 10,
    "w3-small": 10,
    "w2": 3,
    "w2-small": 3,
    "mixed-weights": 16,  # without a budget: as good as 4 bits everywhere
    "fp8-weights": 28,  # 3 bits of mantissa
    "ternary": 1,
    "binary": 0,
    "fp16": 50,
    "fp16-weights": 55,
}


def model() -> ir.Model:
    rng = np.random.default_rng(3)
    proto = onnx.parser.parse_model(MODEL)
    for name, shape in SHAPES.items():
        weight = rng.standard_normal(shape) / np.sqrt(shape[0])
        proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    return ir.from_proto(proto)


def samples() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(4)
    return [{"x": rng.standard_normal((16, 64)).astype(np.float32)} for _ in range(12)]


def _options(folder: Path, recipe: str, target: str = TARGET) -> Options:
    ir.save(model(), folder / "m.onnx")
    budget = {"size": 60000.0} if recipe == "mixed" else {}
    return Options(
        model=folder / "m.onnx",
        target=target,
        data=samples(),
        output=folder / "q.onnx",
        recipe=recipe,
        gate=False,
        budget=budget,
        dims={"N": 16},
    )


def _decibel(made: Path, config: SessionConfig | None = None) -> float:
    feeds = {"x": np.random.default_rng(9).standard_normal((64, 64)).astype(np.float32)}
    exact = run(open_session(model()), feeds)["y"].astype(np.float64)
    found = run(open_session(made, config), feeds)["y"].astype(np.float64)
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


@pytest.mark.parametrize("recipe", sorted(LEAST_DB))
def test_a_recipe_runs_in_plain_onnxruntime(tmp_path: Path, recipe: str) -> None:
    made = quantize(_options(tmp_path, recipe))
    formats = {row["format"] for row in made.report["layers"] if row["role"] == "anchor"}  # type: ignore[index]
    wanted = load_recipe(recipe).recipe
    assert formats <= set(wanted.formats) and formats != {"float"}
    assert _decibel(made.model) > LEAST_DB[recipe]
    if recipe != "binary":  # as large as ternary in 2 bits
        assert made.model.stat().st_size < (tmp_path / "m.onnx").stat().st_size


def test_weight_only_formats_run_where_every_integer_gets_a_zero_point(tmp_path: Path) -> None:
    options = _options(tmp_path, "w8", "x86-avx2")
    made = quantize(options)
    settings = load_profile("x86-avx2").runtimes.onnxruntime.session_config
    assert "session.x64quantprecision" in settings
    assert _decibel(made.model, SessionConfig(session_config_entries=settings)) > LEAST_DB["w8"]


def test_every_recipe_is_tried_or_refused() -> None:
    formats = load_profile(TARGET).runtimes.onnxruntime.formats()
    for name in recipe_names():
        recipe = load_recipe(name).recipe
        if recipe.migrate.rotate:  # for decoders: tests/numeric/test_decoder_recipes.py
            continue
        chosen = recipe.formats if recipe.choose == "allocate" else recipe.formats[:1]
        assert any(f in formats for f in chosen) == (name in LEAST_DB)


def test_what_the_target_cannot_execute_is_refused_with_alternatives(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        quantize(_options(tmp_path, "w8a16"))
    assert caught.value.message == (
        f"--recipe: ONNX Runtime has no kernel for the format w8a16 on {TARGET}\n  fix: formats there: "
        + ", ".join(load_profile(TARGET).runtimes.onnxruntime.formats())
    )
    with pytest.raises(UsageError, match="ONNX Runtime has it: bitwright quantize --recipe nf4"):
        compile_model(_options(tmp_path, "nf4"))


PROFILE = """\
schema: 1
name: wide
extends: x86-avx512-vnni
description: "executes 16-bit and 8-bit floating point activations, by dequantizing"
qspaces:
  a16: {bits: 16, signed: false, granularity: tensor}
  f8: {codebook: e4m3, symmetric: true, granularity: channel}
  f8_tensor: {codebook: e4m3, symmetric: true, granularity: tensor}
runtimes:
  onnxruntime:
    session_config: {session.disable_quant_qdq: "1"}  # no kernel takes these integers; without it the fusions break
    ops:
      MatMul:
        combos:
          - {format: w8a16, accumulator: f32, act: a16, weight: w8, out: [f32]}
          - {format: fp8, act: f8_tensor, weight: f8, out: [f32]}
      Gemm:
        combos:
          - {format: w8a16, accumulator: f32, act: a16, weight: w8, out: [f32]}
          - {format: fp8, act: f8_tensor, weight: f8, out: [f32]}
"""


@pytest.mark.parametrize(("recipe", "least"), [("w8a16", 38), ("fp8", 22)])
def test_a_profile_of_ones_own_brings_further_formats(tmp_path: Path, recipe: str, least: float) -> None:
    (tmp_path / "wide.yaml").write_text(PROFILE)
    made = quantize(_options(tmp_path, recipe, str(tmp_path / "wide.yaml")))
    formats = {row["format"] for row in made.report["layers"] if row["role"] == "anchor"}  # type: ignore[index]
    assert formats == {recipe}
    assert (
        _decibel(made.model, SessionConfig(session_config_entries={"session.disable_quant_qdq": "1"})) > least
    )
