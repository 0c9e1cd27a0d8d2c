"""ONNX Runtime's SimplifiedLayerNormalization, which exporters put into the standard domain, spelled out.

No version of the standard has that operator, so neither the checker nor shape inference would know it. Only ONNX
Runtime does, and it makes the operator again out of what is written here.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

OPERATOR = "SimplifiedLayerNormalization"
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
# From this version on the axes of ReduceMean are an input.
AXES_AS_INPUT = 18
LAST = -1


def expand_norms(model: onnx.ModelProto) -> int:
    """Replace the operator in the main graph by Pow, ReduceMean, Add, Sqrt, Div and Mul, in place.

    What it is not certain about stays, and is refused as an unknown operator later: gains that are computed, another
    axis, a second output that is read, other precisions than float32 in between.

    Returns:
        How many were replaced.
    """
    version = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)
    own = any(f.name == OPERATOR for f in model.functions)
    if own or not any(node.op_type == OPERATOR for node in model.graph.node):
        return 0
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        if _is_plain(node, kinds):
            nodes += _spelled_out(node, kinds[node.input[1]], version, f"bitwright.norm.{count}")
            count += 1
        else:
            nodes.append(node)
    if count:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return count


def _is_plain(node: onnx.NodeProto, kinds: dict[str, int]) -> bool:
    if node.op_type != OPERATOR or node.domain not in ("", "ai.onnx"):
        return False
    operands = len(node.input) == 2 and kinds.get(node.input[1]) in FLOATS
    results = len(node.output) >= 1 and not any(node.output[1:])
    known = {a.name for a in node.attribute} <= {"axis", "epsilon", "stash_type"}
    values = {a.name: a.i for a in node.attribute}
    plain = (
        values.get("axis", LAST) == LAST and values.get("stash_type", TensorProto.FLOAT) == TensorProto.FLOAT
    )
    return operands and results and known and plain


def _spelled_out(node: onnx.NodeProto, kind: int, version: int, stem: str) -> Iterator[onnx.NodeProto]:
    """Yield ``gain * (x / sqrt(mean(x^2) + eps))``, all but the product in float32."""
    x, gain = node.input
    if kind != TensorProto.FLOAT:
        yield helper.make_node("Cast", [x], [f"{stem}.x"], to=TensorProto.FLOAT)
        x = f"{stem}.x"
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    yield helper.make_node("Constant", [], [f"{stem}.two"], value_float=2.0)
    yield helper.make_node("Constant", [], [f"{stem}.eps"], value_float=epsilon)
    yield helper.make_node("Pow", [x, f"{stem}.two"], [f"{stem}.square"])
    if version >= AXES_AS_INPUT:
        yield helper.make_node("Constant", [], [f"{stem}.axes"], value_ints=[LAST])
        yield helper.make_node("ReduceMean", [f"{stem}.square", f"{stem}.axes"], [f"{stem}.mean"])
    else:
        yield helper.make_node("ReduceMean", [f"{stem}.square"], [f"{stem}.mean"], axes=[LAST])
    yield helper.make_node("Add", [f"{stem}.mean", f"{stem}.eps"], [f"{stem}.sum"])
    yield helper.make_node("Sqrt", [f"{stem}.sum"], [f"{stem}.root"])
    yield helper.make_node("Div", [x, f"{stem}.root"], [f"{stem}.unit"])
    unit = f"{stem}.unit"
    if kind != TensorProto.FLOAT:
        yield helper.make_node("Cast", [unit], [f"{stem}.cast"], to=kind)
        unit = f"{stem}.cast"
    yield helper.make_node("Mul", [unit, gain], [node.output[0]], name=node.name)
