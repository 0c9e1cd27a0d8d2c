"""Weights stored in 16 bits: exact values, half the file, folded by ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from pass_harness import add_weights, check_pass, parse, random, run_onnxruntime

from bitwright.compiler.errors import InternalError
from bitwright.passes.store_narrow import StoreNarrow

HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
TEXT = HEAD + (
    "g (float[2,32] x, float[32,16] w, float[16] c) => (float[2,16] y)\n{ m = MatMul(x, w)\n y = Add(m, c) }"
)


def two_layers(weight: np.ndarray) -> ir.Model:
    return add_weights(parse(TEXT), w=weight, c=random(16, seed=2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_values_are_the_rounded_ones(dtype: str) -> None:
    weight = random(32, 16, seed=1)
    model = two_layers(weight)
    # Half an ulp of the products' weights: 2^-11 in float16, 2^-8 in bfloat16; sums of 32 products average it out.
    check_pass(
        StoreNarrow(dtype),
        model,
        {"x": random(2, 32)},
        fires=1,
        bound={"float16": 2**-11, "bfloat16": 2**-8}[dtype],
    )
    stored = model.graph.initializers[f"w_{dtype}"].const_value
    assert stored is not None
    rounded = weight.astype(ir.DataType[dtype.upper()].numpy())
    np.testing.assert_array_equal(stored.numpy().view(np.uint16), rounded.view(np.uint16))
    x = random(2, 32)
    expected = run_onnxruntime(two_layers(rounded.astype(np.float32)), {"x": x})["y"]
    np.testing.assert_array_equal(run_onnxruntime(model, {"x": x})["y"], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_onnxruntime_folds_the_cast(dtype: str, tmp_path: Path) -> None:
    model = two_layers(random(32, 16, seed=1))
    StoreNarrow(dtype).run(model)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    left = Counter(n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node)
    assert "Cast" not in left


def test_what_float16_cannot_hold_stays_and_is_named() -> None:
    large, small, lost = random(32, 16), random(32, 16), random(32, 16) * np.float32(1e-8)
    large[3, 4] = 7e4
    small[3, 4] = 1e-9  # one small weight among normal ones is no loss
    for weight, fires in ((large, 0), (small, 1), (lost, 0)):
        result = StoreNarrow().run(two_layers(weight))
        assert result.changed == fires
        assert bool(result.notes) == (fires == 0)
    assert StoreNarrow("bfloat16").run(two_layers(large)).changed == 1


def test_only_weights_of_inner_values_are_touched() -> None:
    model = two_layers(random(32, 16))
    model.graph.outputs.append(model.graph.initializers["w"])
    assert StoreNarrow().run(model).changed == 0
    assert StoreNarrow(weights=frozenset({"c"})).run(two_layers(random(32, 16))).changed == 1
    assert StoreNarrow(weights=frozenset({"absent"})).run(two_layers(random(32, 16))).changed == 0
    with pytest.raises(InternalError, match="float12"):
        StoreNarrow("float12").run(model)


def test_scales_of_quantizers_keep_their_precision() -> None:
    text = HEAD + (
        "g (float[2,64] x, float[64] s, int8[64] z) => (float[2,64] y)\n"
        "{ q = QuantizeLinear<axis=1>(x, s, z)\n y = DequantizeLinear<axis=1>(q, s, z) }"
    )
    model = add_weights(parse(text), s=np.abs(random(64)) + np.float32(0.1), z=np.zeros(64, np.int8))
    assert StoreNarrow().run(model).changed == 0
