"""Repeated key and value heads are multiplied once, and nothing else is rewritten."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from pass_harness import FLOAT32, check_pass, parse, random

from bitwright.passes.fix_dims import FixDims
from bitwright.passes.group_queries import GroupQueries
from bitwright.passes.infer_shapes import InferShapes

ATTENTION = """<ir_version: 10, opset_import: ["" : 20]>
attention (float[2,6,T,8] q, float[2,{heads},5,8] k, float[2,{heads},5,8] v) => (float[2,6,T,{width}] y)
<int64[1] axis = {{{axis}}}, int64[5] copies = {{{copies}}}, int64[4] merged = {{{merged}}}>
{{
  ku = Unsqueeze(k, axis)
  ke = Expand(ku, copies)
  kr = Reshape(ke, merged)
  kt = Transpose<perm = [{perm}]>(kr)
  a = MatMul(q, kt)
  p = Softmax(a)
  vu = Unsqueeze(v, axis)
  ve = Expand(vu, copies)
  vr = Reshape(ve, merged)
  y = MatMul(p, vr)
}}"""


def attention(
    heads: int = 2,
    *,
    axis: int = 2,
    copies: tuple[int, ...] = (2, 2, 3, 5, 8),
    merged: tuple[int, ...] = (2, 6, 5, 8),
    perm: str = "0, 1, 3, 2",
    rows: int | None = 3,
) -> ir.Model:
    lists = {"copies": ", ".join(map(str, copies)), "merged": ", ".join(map(str, merged))}
    model = parse(ATTENTION.format(heads=heads, axis=axis, perm=perm, width=8, **lists))
    if rows is not None:
        FixDims({"T": rows}).run(model)
    InferShapes().run(model)
    return model


def feeds(heads: int = 2, rows: int = 3) -> dict[str, np.ndarray]:
    return {
        "q": random(2, 6, rows, 8),
        "k": random(2, heads, 5, 8, seed=1),
        "v": random(2, heads, 5, 8, seed=2),
    }


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("heads", "copies"), [(2, 3), (3, 2), (1, 6)])
def test_copies_disappear(heads: int, copies: int, rows: int) -> None:
    model = attention(heads, copies=(2, heads, copies, 5, 8), rows=rows)
    ops = {"Reshape": 4, "MatMul": 2, "Softmax": 1, "Transpose": 1}
    check_pass(GroupQueries(), model, feeds(heads, rows), fires=2, ops=ops, bound=FLOAT32)
    shapes = [tuple(n.inputs[0].shape) for n in model.graph if n.op_type == "MatMul"]  # type: ignore[union-attr, arg-type]
    assert shapes == [(2, heads, copies * rows, 8), (2, heads, copies * rows, 5)]


def test_copies_that_lie_apart_stay() -> None:
    """Tiled heads (0, 1, 0, 1, ...) belong to other queries than repeated ones (0, 0, ..., 1, 1, ...)."""
    check_pass(GroupQueries(), attention(axis=1, copies=(2, 3, 2, 5, 8)), feeds(), fires=0)


def test_a_single_copy_stays() -> None:
    model = attention(6, copies=(2, 6, 1, 5, 8))
    check_pass(GroupQueries(), model, feeds(6), fires=0)


def test_unknown_sizes_stay() -> None:
    check_pass(GroupQueries(), attention(rows=None), feeds(), fires=0)


def test_copies_that_something_else_reads_are_kept_for_it() -> None:
    model = attention()
    value = next(n.outputs[0] for n in model.graph if n.outputs[0].name == "vr")
    model.graph.outputs.append(value)
    result = check_pass(GroupQueries(), model, feeds(), fires=2, bound=FLOAT32)
    assert [n.op_type for n in result.model.graph].count("Expand") == 1
