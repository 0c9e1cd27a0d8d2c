"""Graphs in which scaling a value's channels would change the result: the pass leaves them alone and says why."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from bitwright.passes.channel_groups import channel_groups
from bitwright.passes.infer_shapes import InferShapes

HEADER = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[1, 4, 6, 6] x, bool flag) => (float[1, 4, 6, 6] y{more})
<float[4, 4, 1, 1] w = {{1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4}},
 float[4, 4, 1, 1] v = {{1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4}},
 float zero = {{0}}, float six = {{6}}, float huge = {{3.4028235e38}}> {{
    {body}
}}
"""

STUCK = {
    "clip": ("a = Conv (x, w)  b = Clip (a, zero, six)  y = Conv (b, v)", "Clip"),
    "sigmoid": ("a = Conv (x, w)  b = Sigmoid (a)  y = Conv (b, v)", ""),
    "swish": ("a = Conv (x, w)  s = Sigmoid (a)  b = Mul (a, s)  y = Conv (b, v)", "Mul"),
    "square": ("a = Conv (x, w)  b = Mul (a, a)  y = Conv (b, v)", "Mul"),
    "add_input": ("a = Conv (x, w)  b = Add (a, x)  y = Conv (b, v)", "input of the graph"),
    "add_constant": ("a = Conv (x, w)  b = Add (a, six)  y = Conv (b, v)", "Add"),
    "shared_weight": ("a = Conv (x, w)  b = Relu (a)  y = Conv (b, w)", "shared"),
    "computed_weight": ("a = Conv (x, w)  b = Relu (a)  k = Relu (v)  y = Conv (b, k)", "no constant"),
    "reader_beside": (
        "a = Conv (x, w)  s = Softmax <axis = 1> (a)  b = Add (a, s)  y = Conv (b, v)",
        "Softmax",
    ),
    "transposed": (
        "a = Conv (x, w)  b = Transpose <perm = [0, 2, 1, 3]> (a)  c = Add (a, x)  y = Conv (c, v)",
        "",
    ),
    "subgraph": (
        "a = Conv (x, w)  b = Relu (a)  c = If (flag) <then_branch = t () => (float[1, 4, 6, 6] p) { p = Relu (b) },"
        " else_branch = e () => (float[1, 4, 6, 6] q) { q = Neg (b) }>  d = Conv (b, v)  y = Add (c, d)",
        "subgraph",
    ),
}


def groups_of(body: str, more: str = "") -> list[tuple[list[str], str]]:
    """Return values and reason of each group with a layer at either end."""
    model = ir.from_proto(onnx.parser.parse_model(HEADER.format(body=body, more=more)))
    model = InferShapes().run(model).model
    return [([v.name or "" for v in g.values], g.why_not) for g in channel_groups(model)]


@pytest.mark.parametrize("case", STUCK)
def test_stays(case: str) -> None:
    body, reason = STUCK[case]
    found = groups_of(body)
    assert all(why for _, why in found), "a group was found that must not be scaled"
    if reason:
        assert found and reason in found[0][1]


def test_graph_output_stays() -> None:
    ((_, why),) = groups_of("a = Conv (x, w)  z = Relu (a)  y = Conv (z, v)", ", float[1, 4, 6, 6] z")
    assert "output of the graph" in why


@pytest.mark.parametrize(
    "middle",
    [
        "b = Clip (a, zero, huge)",
        "b = Clip (a, zero)",
        "b = LeakyRelu (a)",
        "s = Shape (a)  b = Relu (a)",
        "m = MaxPool <kernel_shape = [1, 1]> (a)  b = Add (m, a)",
        "p = GlobalAveragePool (x)  g = Sigmoid (p)  b = Mul (a, g)",
        "p = GlobalAveragePool (a)  c = Relu (a)  b = Mul (c, six)",
    ],
)
def test_factor_passes(middle: str) -> None:
    found = groups_of(f"a = Conv (x, w)  {middle}  y = Conv (b, v)")
    assert [why for _, why in found] == [""]
    assert {"a", "b"} <= set(found[0][0])
