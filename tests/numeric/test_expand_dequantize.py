"""Constants dequantized by arithmetic that ONNX Runtime folds: equal bits, and nothing left to do at run time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from pass_harness import add_weights, check_pass, count_ops, parse, random

from bitwright.passes.expand_dequantize import ExpandDequantize
from bitwright.passes.remove_unused import RemoveUnused
from bitwright.passes.stored_weights import stored_type

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'


def dequantized(dtype: str, onnx_dtype: str, axis: int | None, zero: bool) -> ir.Model:
    """``MatMul(x, DequantizeLinear(constant))`` with the constant in a type, per tensor or along an axis."""
    size = () if axis is None else ((6, 5)[axis],)
    scales = "float" if axis is None else f"float[{size[0]}]"
    points = onnx_dtype if axis is None else f"{onnx_dtype}[{size[0]}]"
    model = parse(
        HEAD + f"g (float[3,6] x, {onnx_dtype}[6,5] w8, {scales} s, {points} z) => (float[3,5] y)\n"
        f"{{ w = DequantizeLinear<axis={axis or 0}>(w8, s, z)\n y = MatMul(x, w) }}"
    )
    kind = stored_type(dtype)
    integers = (random(6, 5, seed=1) * 40).astype(kind) if not dtype.startswith("uint") else None
    integers = np.arange(30).reshape(6, 5).astype(kind) if integers is None else integers
    points_array = np.full(size, 3 if zero else 0).astype(kind)
    return add_weights(model, w8=integers, s=np.abs(random(*size, seed=2)) + np.float32(0.1), z=points_array)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(
    ("dtype", "onnx_dtype", "zero"),
    [
        ("int8", "int8", False),
        ("int8", "int8", True),
        ("uint8", "uint8", True),
        ("int16", "int16", False),
        ("uint16", "uint16", True),
        ("float8_e4m3fn", "float8e4m3fn", False),
        ("float8_e5m2", "float8e5m2", False),
    ],
)
def test_the_float_weights_are_equal_bit_for_bit(
    dtype: str, onnx_dtype: str, zero: bool, axis: int | None, tmp_path: Path
) -> None:
    model = dequantized(dtype, onnx_dtype, axis, zero)
    check_pass(ExpandDequantize(), model, {"x": random(3, 6)}, fires=1)
    RemoveUnused().run(model)
    assert count_ops(model) == {"Cast": 1, "Mul": 1, "MatMul": 1} | ({"Sub": 1} if zero else {})
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    left = Counter(n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node)
    assert left == {"MatMul": 1}, "ONNX Runtime did not fold the weight"


def test_only_the_named_constants_and_no_activations() -> None:
    text = HEAD + (
        "g (int8[2,2] x) => (float[2,2] y) <int8[2,2] a={1,2,3,4}, int8[2,2] b={1,2,3,4}, float s={0.5}, int8 z={0}>\n"
        "{ xd = DequantizeLinear(x, s, z)\n ad = DequantizeLinear(a, s, z)\n bd = DequantizeLinear(b, s, z)\n"
        " m = MatMul(xd, ad)\n y = MatMul(m, bd) }"
    )
    model = parse(text)
    assert ExpandDequantize(frozenset({"a"})).run(model).changed == 1
    assert count_ops(model)["DequantizeLinear"] == 2
    assert ExpandDequantize().run(model).changed == 1
    assert [n.inputs[0].name for n in model.graph if n.op_type == "DequantizeLinear"] == ["x"]  # type: ignore[union-attr]


def test_blocks_are_left_alone() -> None:
    text = HEAD + (
        "g (float[1,4] x) => (float[1,2] y) <int8[4,2] w8={1,2,3,4,5,6,7,8}, float[2,2] s={0.5,1.0,2.0,1.0}>\n"
        "{ w = DequantizeLinear<axis=0, block_size=2>(w8, s)\n y = MatMul(x, w) }"
    )
    model = parse(text)
    assert ExpandDequantize().run(model).changed == 0
