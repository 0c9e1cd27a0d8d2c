"""Recipes for decoders of the llama family, on a small one; on tinylm, where it is, against the float perplexity."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from llama_models import Sizes, llama_model

from bitwright.compiler.deploy import quantize
from bitwright.compiler.errors import ModelError
from bitwright.compiler.graph.saving import weight_bytes
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import SessionConfig, open_session, run
from bitwright.compiler.recipe.loader import load_recipe, recipe_names

SIZES = Sizes(layers=2, width=64, heads=4, key_heads=2, feed_forward=128, vocabulary=1100, positions=32)
TARGET = "x86-avx512-vnni"
ROTATED = [name for name in recipe_names() if load_recipe(name).recipe.migrate.rotate]
# Signal over noise of the logits, about 6 dB a bit; unrelated logits of the same size would have -3 dB.
LEAST_DB = {"w4a8-rotated": 8, "w3-rotated": 2, "w2-rotated": -2}
WINDOW = 256


def options(folder: Path, recipe: str, sizes: Sizes = SIZES, **more: object) -> Options:
    rng = np.random.default_rng(0)
    samples = [{"ids": rng.integers(0, SIZES.vocabulary, (1, 24))} for _ in range(8)]
    onnx.save(llama_model(sizes), folder / "m.onnx")
    more = {"data": samples, **more}
    return Options(folder / "m.onnx", TARGET, output=folder / "q.onnx", recipe=recipe, gate=False, **more)  # type: ignore[arg-type]


def decibel(folder: Path) -> float:
    feeds = {"ids": np.random.default_rng(9).integers(0, SIZES.vocabulary, (1, 30))}
    exact, found = (
        run(open_session(ir.load(folder / name)), feeds)["scores"].astype(np.float64)
        for name in ("m.onnx", "q.onnx")
    )
    return float(10 * np.log10((exact**2).sum() / ((exact - found) ** 2).sum()))


@pytest.mark.parametrize("recipe", ROTATED)
def test_rotated_recipes(tmp_path: Path, recipe: str) -> None:
    made = quantize(options(tmp_path, recipe))
    formats = {row["format"] for row in made.report["layers"] if row["role"] == "anchor"}  # type: ignore[index]
    assert formats <= {load_recipe(recipe).recipe.formats[0], "float"} and formats != {"float"}
    assert decibel(tmp_path) > LEAST_DB[recipe]


def test_products_that_rotate_at_run_time_stay_float(tmp_path: Path) -> None:
    text = (
        "schema: 1\nname: mine\nformats: [w4]\n"
        "migrate: {equalize: false, smooth: false, disassemble: 0, rotate: true, rotate_down: 32}\n"
    )
    (tmp_path / "mine.yaml").write_text(text)
    made = quantize(options(tmp_path, str(tmp_path / "mine.yaml")))
    rows = {row["node"]: row["format"] for row in made.report["layers"]}  # type: ignore[index]
    online = {name: fmt for name, fmt in rows.items() if name.endswith("_blocks_MatMul")}
    assert list(online.values()) == ["float", "float"]
    assert decibel(tmp_path) > LEAST_DB["w4a8-rotated"]


def test_a_rotation_is_refused_where_there_is_no_decoder(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["": 20]>
    g (float[4, 64] x) => (float[4, 64] y) { y = MatMul(x, w) }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    asked = options(tmp_path, "w4a8-rotated", data=[{"x": weight[:4]}])
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="not a llama decoder"):
        quantize(asked)


def test_a_budget_of_bits_counts_what_the_file_holds(tmp_path: Path) -> None:
    """Scales, zero points, embedding and head included; the head shares the embedding's bytes."""
    small = replace(SIZES, layers=1, feed_forward=64)
    quantize(options(tmp_path, "mixed-weights", small, budget={"bits": 4.5}, loss="kl"))
    proto = llama_model(small)
    sizes = {i.name: int(np.prod(i.dims)) for i in proto.graph.initializer}
    weights = sum(n for name, n in sizes.items() if name.startswith("w_") and name != "w_head")
    model = ir.load(tmp_path / "q.onnx")
    others = 4 * sum(n for name, n in sizes.items() if not name.startswith("w_"))
    bits = 8 * (weight_bytes(model) - others) / weights
    # Beside weights there are constants of the graph's shapes, and zero points are packed in whole bytes a column.
    assert 3.9 < bits < 4.75
    assert decibel(tmp_path) > LEAST_DB["w3-rotated"]


# ----------------------------------------------------------------------------------------------------- the real decoder


@pytest.mark.skipif("BITWRIGHT_ZOO" not in os.environ, reason="BITWRIGHT_ZOO names no folder of models")
def test_perplexity_of_tinylm(tmp_path: Path) -> None:
    """On 16 windows of held-out text; the whole table is benchmarks/language_models/formats.py."""
    folder = Path(os.environ["BITWRIGHT_ZOO"]) / "tinylm"
    with np.load(folder / "data.npz") as data:
        tokens, calibration = data["test"].astype(np.int64), data["calib"].astype(np.int64)
    samples = [{"input_ids": part[None]} for part in calibration[: 8 * WINDOW].reshape(-1, WINDOW)]
    made = quantize(
        Options(
            folder / "model.onnx",
            TARGET,
            samples,
            output=tmp_path / "q.onnx",
            recipe="w4a8-rotated",
            gate=False,
        )
    )
    starts = np.linspace(0, len(tokens) - WINDOW - 2, 16).astype(int)
    windows = [tokens[k : k + WINDOW + 1] for k in starts]

    def loss(model: Path) -> float:
        session = open_session(ir.load(model), SessionConfig(threads=1))
        found = []
        for part in windows:
            logits = run(session, {"input_ids": part[None, :-1]})["logits"][0].astype(np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            found.append((np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(WINDOW), part[1:]]).mean())
        return float(np.mean(found))

    assert np.exp(loss(made.model) - loss(folder / "model.onnx")) <= 1.06
