"""Half precision: what becomes narrow, what must not and why, where the Casts stand, and what the numbers cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from pass_harness import add_weights, check_pass, count_ops, parse, random, run_onnxruntime

from bitwright.compiler.errors import InternalError
from bitwright.passes.contract import PassResult
from bitwright.passes.infer_shapes import InferShapes
from bitwright.passes.narrow_floats import NarrowFloats

GOLDEN = Path(__file__).parents[1] / "golden"
HEAD = '<ir_version: 10, opset_import: ["" : 20]>\n'
# One rounding to 11 bits is 2^-11 of a value; a few in a row, on a sum of values, stay within eight of them.
FLOAT16 = 2.0**-8


def typed(text: str, **weights: np.ndarray) -> ir.Model:
    model = add_weights(parse(HEAD + text), **weights)
    InferShapes().run(model)
    return model


def check(
    model: ir.Model, feeds: Mapping[str, np.ndarray], fires: int, bound: float = FLOAT16, **options: object
) -> PassResult:
    """Check the contract of a pass, and that nodes stand behind their inputs and no value is cast twice to a type."""
    result = check_pass(NarrowFloats(**options), model, feeds, fires=fires, bound=bound)  # type: ignore[arg-type]
    casts = [
        (n.inputs[0], n.attributes.get_int("to", 0)) for g in model.graphs() for n in g if n.op_type == "Cast"
    ]
    assert len(casts) == len(set(casts)), "a value is cast twice"
    sources = [v.producer() for v, _ in casts if v is not None]
    assert not any(n is not None and n.op_type == "Cast" and _is_ours(n) for n in sources), (
        "a Cast is cast back"
    )
    return result


def _is_ours(node: ir.Node) -> bool:
    return (node.name or "").endswith(("_to_float16", "_to_float32"))


def types(model: ir.Model) -> dict[str, str]:
    return {
        o.name or "": o.dtype.name
        for g in model.graphs()
        for n in g
        for o in n.outputs
        if o.dtype is not None
    }


def reasons(result: PassResult) -> str:
    return "\n".join(result.notes)


MLP = (
    "g (float[B,16] x, float[16,8] w, float[8] c, float[8,4] v) => (float[B,4] y)\n"
    "{ a = MatMul(x, w)\n b = Add(a, c)\n d = Relu(b)\n y = MatMul(d, v) }"
)


def mlp() -> ir.Model:
    return typed(MLP, w=random(16, 8, seed=1), c=random(8, seed=2), v=random(8, 4, seed=3))


def test_a_chain_is_one_region_with_a_cast_at_each_end() -> None:
    model = mlp()
    check(model, {"x": random(3, 16)}, fires=4)
    assert [n.op_type for n in model.graph] == ["Cast", "MatMul", "Add", "Relu", "MatMul", "Cast"]
    assert all(v.dtype == ir.DataType.FLOAT16 for v in model.graph.initializers.values())
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [ir.DataType.FLOAT] * 2
    golden = GOLDEN / "narrow_region.txt"
    assert [
        f"{n.op_type}({', '.join(v.name or '' for v in n.inputs if v)}) -> {n.outputs[0].name}"
        for n in model.graph
    ] == (golden.read_text().splitlines())


def test_edges_become_narrow_on_request() -> None:
    model = mlp()
    result = NarrowFloats(keep_io=False).run(model)
    assert result.changed == 4 + 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert "Cast" not in count_ops(model)
    found = run_onnxruntime(model, {"x": random(3, 16).astype(np.float16)})["y"]
    assert found.dtype == np.float16
    assert NarrowFloats(keep_io=False).run(model).changed == 0


def test_named_nodes_only() -> None:
    model = typed(MLP.replace("d = Relu", "[relu] d = Relu"), w=random(16, 8), c=random(8), v=random(8, 4))
    check(model, {"x": random(3, 16)}, fires=1, nodes=frozenset({"relu"}))
    assert count_ops(model) == {"MatMul": 2, "Add": 1, "Relu": 1, "Cast": 2}
    assert all(v.dtype == ir.DataType.FLOAT for v in model.graph.initializers.values())


def test_a_tensor_that_overflows_keeps_float32_around_it() -> None:
    text = (
        "g (float[B,16] x, float[16,8] w) => (float[B,8] y)\n"
        "{ a = MatMul(x, w)\n b = Mul(a, k)\n d = Mul(b, r)\n y = Relu(d) }"
    )
    text = text.replace("(float[B,8] y)", "(float[B,8] y) <float k={3e4}, float r={3.3e-5}>")
    x = random(3, 16)
    model = typed(text, w=random(16, 8))
    result = check(model, {"x": x}, fires=2, ranges={"b": (-4e5, 4e5), "d": (-15.0, 15.0)})
    assert types(model)["b"] == "FLOAT"
    assert types(model)["a"] == "FLOAT16"
    assert "tensor 'b' reaches 4e+05" in reasons(result)
    # The same range within the headroom of a wider format is no reason.
    wide = typed(text, w=random(16, 8))
    assert NarrowFloats("bfloat16", ranges={"b": (-4e5, 4e5)}).run(wide).changed == 4


def test_headroom_is_part_of_the_limit() -> None:
    for high, fires in ((32000.0, 1), (33000.0, 0)):
        model = typed("g (float[4] x) => (float[4] y)\n{ y = Relu(x) }")
        assert NarrowFloats(ranges={"x": (0.0, high)}).run(model).changed == fires
    model = typed("g (float[4] x) => (float[4] y)\n{ y = Relu(x) }")
    assert NarrowFloats(ranges={"x": (0.0, 33000.0)}, headroom=1.5).run(model).changed == 1


def test_a_value_of_unknown_range_behind_one_too_large_keeps_float32() -> None:
    text = (
        "g (float[4] x) => (float[4] y) <float big={1e6}, float small={1e-3}>\n"
        "{ a = Mul(x, big)\n b = Neg(a)\n d = Tanh(b)\n y = Add(d, d) }"
    )
    model = typed(text)
    check(model, {"x": random(4)}, fires=1)
    assert types(model)["b"] == "FLOAT"


LAYER_NORM = """g (float[B,16] x) => (float[B,16] y) <float two={2.0}, float eps={EPS}, int64[1] ax={-1}>
{ m = ReduceMean(x, ax)
  d = Sub(x, m)
  q = Pow(d, two)
  v = ReduceMean(q, ax)
  e = Add(v, eps)
  s = Sqrt(e)
  y = Div(d, s) }"""


@pytest.mark.parametrize("eps", ["1e-5", "1e-12"])
def test_the_statistics_of_a_spelled_out_norm_keep_float32(eps: str) -> None:
    model = typed(LAYER_NORM.replace("EPS", eps))
    # Rows whose squares a float16 could not tell from zero.
    result = check(model, {"x": random(3, 16) * np.array([[1e-3], [1.0], [30.0]], np.float32)}, fires=2)
    narrow = {n for n, t in types(model).items() if t == "FLOAT16"}
    assert narrow == {"m", "d", "x_float16"}
    assert "underflows float16" in reasons(result)
    assert NarrowFloats("bfloat16").run(typed(LAYER_NORM.replace("EPS", eps))).changed == 7


def test_an_operator_that_normalizes_in_float32_itself_may_be_narrow() -> None:
    text = (
        "g (float[B,16] x, float[16] g) => (float[B,16] y)\n{ y = LayerNormalization<epsilon=1e-12>(x, g) }"
    )
    check(typed(text, g=random(16)), {"x": random(3, 16)}, fires=1)
    text = (
        "g (float[2,4,5] x, float[4] g, float[4] b) => (float[2,4,5] y)\n"
        "{ y = InstanceNormalization<epsilon=1e-5>(x, g, b) }"
    )
    result = check(typed(text, g=random(4), b=random(4)), {"x": random(2, 4, 5)}, fires=0)
    assert result.changed == 0


ATTENTION = """g (float[B,4,4] s, int64[B,4] mask) => (float[B,4,4] y)
<float one={1.0}, float lowest={-3.4028235e38}, int64[1] ax={1}, float k={0.125}>
{ f = Cast<to=1>(mask)
  i = Sub(one, f)
  big = Mul(i, lowest)
  wide = Unsqueeze(big, ax)
  t = Mul(s, k)
  a = Add(t, wide)
  y = Softmax(a) }"""


@pytest.mark.parametrize(
    "ranges", [{}, {"big": (-3.4028235e38, 0.0), "wide": (-3.4028235e38, 0.0), "a": (-3.4028235e38, 9.0)}]
)
def test_a_mask_is_clamped_and_says_the_same(ranges: dict[str, tuple[float, float]]) -> None:
    model = typed(ATTENTION)
    mask = np.array([[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], np.int64)
    feeds = {"s": random(3, 4, 4), "mask": mask}
    before = run_onnxruntime(model, feeds)["y"]
    check_model = NarrowFloats(ranges=ranges)
    assert check_model.run(model).changed == 5
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    after = run_onnxruntime(model, feeds)["y"]
    # Masked positions have no weight at all; a row with nothing left must not become NaN.
    np.testing.assert_allclose(after[:2], before[:2], atol=2**-10)
    assert (after[:2][before[:2] == 0] == 0).all()
    np.testing.assert_allclose(after[2].sum(axis=-1), 1, atol=2**-9)
    assert check_model.run(model).changed == 0


def test_a_large_constant_that_is_no_mask_is_not_clamped() -> None:
    text = "g (float[4] x) => (float[4] y) <float low={-3.4e38}>\n{ a = Max(x, low)\n y = Relu(a) }"
    check(typed(text), {"x": random(4)}, fires=0)
    text = (
        "g (float[4] x) => (float[4] y) <float low={-3.4e38}, float high={3.4e38}>\n"
        "{ a = Clip(x, low, high)\n y = Relu(a) }"
    )
    model = typed(text)
    check(model, {"x": random(4)}, fires=2)
    low = model.graph.initializers["low"].const_value
    assert low is not None and low.numpy() == np.float16(-65504)


def test_positions_and_sizes_keep_float32() -> None:
    text = """g (float[B,S,8] x, int64[S] p) => (float[B,S,8] y)
<float[1,8] f={1.0,0.5,0.25,0.125,0.1,0.05,0.02,0.01}, int64[1] ax={1}>
{ c = Cast<to=1>(p)
  u = Unsqueeze(c, ax)
  angle = MatMul(u, f)
  s = Sin(angle)
  y = Mul(x, s) }"""
    model = typed(text)
    # float16 has a step of 2 at position 3000: angles computed in it would be wrong by radians.
    result = check(model, {"x": random(1, 3, 8), "p": np.array([3001, 3002, 3003])}, fires=1)
    assert types(model)["angle"] == types(model)["s"] == "FLOAT"
    assert "computes on integers" in reasons(result)


def test_type_constraints_come_from_the_schemas() -> None:
    text = """g (float[1,2,4,4] x, float[3,4] boxes, int64[1] k) => (float[1,2,8,8] y, float[n] v, float[m] r)
<float[4] scales={1.0,1.0,2.0,2.0}, float zero={0.0}, float one={1.0}, float three={3.0}, int64[1] flat={-1}>
{ y = Resize<mode="nearest">(x, , scales)
  f = Reshape(boxes, flat)
  v, i = TopK(f, k)
  r = Range(zero, three, one) }"""
    model = typed(text)
    check(model, {"x": random(1, 2, 4, 4), "boxes": random(3, 4), "k": np.array([5])}, fires=3)
    assert model.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    assert types(model)["r"] == "FLOAT"


def test_a_weight_with_readers_of_both_kinds_is_stored_once() -> None:
    text = (
        "g (float[8,8] x, float[8,8] w) => (float[8,8] y, float[8,8] z)\n"
        "{ [n] y = MatMul(x, w)\n [k] z = MatMul(x, w) }"
    )
    model = typed(text, w=random(8, 8))
    check(model, {"x": random(8, 8)}, fires=1, nodes=frozenset({"n"}))
    assert list(model.graph.initializers) == ["w"]
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT


IF = """g (float[4] x, bool c) => (float[4] y) <float two={2.0}, float half={0.5}>
{ a = Mul(x, two)
  b = If (c) <then_branch = t () => (float[4] p) { q = Mul(a, half)
 p = Relu(q) }, else_branch = e () => (float[4] r) { r = Neg(a) }>
  y = Add(b, a) }"""


def test_branches_are_converted_and_their_edges_keep_float32() -> None:
    for flag in (True, False):
        model = typed(IF)
        check(model, {"x": random(4), "c": np.array(flag)}, fires=5)
        branch = types(model)
        assert branch["q"] == branch["a"] == "FLOAT16"
        assert branch["p"] == branch["r"] == branch["b"] == "FLOAT"


LOOP = """g (float[4] x, int64 n) => (float[4] y) <float k={0.5}, bool yes={1}>
{ y = Loop (n, yes, x) <body = l (int64 i, bool c, float[4] s) => (bool d, float[4] t) { d = Identity(c)
 u = Mul(s, k)
 t = Add(u, x) }> }"""


def test_a_loop_carries_float32_and_computes_narrow() -> None:
    model = typed(LOOP)
    check(model, {"x": random(4), "n": np.array(5)}, fires=2)
    assert types(model)["u"] == "FLOAT16"
    assert types(model)["t"] == types(model)["y"] == "FLOAT"


def test_unknown_operators_and_types_are_left_alone() -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 20, "acme" : 1]>\ng (float[4] x) => (float[4] y)\n'
        "{ a = Relu(x)\n b = acme.Gate(a)\n y = Relu(b) }"
    )
    model = parse(text)
    result = NarrowFloats().run(model)
    assert result.changed == 0
    a = next(o for n in model.graph for o in n.outputs if o.name == "a")
    a.type, a.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([4])
    result = NarrowFloats().run(model)
    assert result.changed == 1
    assert [n.op_type for n in model.graph] == ["Cast", "Relu", "Cast", "Gate", "Relu"]
    assert "domain 'acme'" in reasons(result)


def test_an_output_that_others_read_keeps_its_name_and_type() -> None:
    text = "g (float[4] x) => (float[4] a, float[4] y)\n{ a = Relu(x)\n y = Neg(a) }"
    model = typed(text)
    check(model, {"x": random(4)}, fires=2)
    assert [(v.name, v.dtype) for v in model.graph.outputs] == [
        ("a", ir.DataType.FLOAT),
        ("y", ir.DataType.FLOAT),
    ]
    assert count_ops(model)["Cast"] == 3


def test_quantizers_keep_float32() -> None:
    text = (
        "g (float[4] x) => (float[4] y) <float s={0.01}, int8 z={0}>\n"
        "{ q = QuantizeLinear(x, s, z)\n d = DequantizeLinear(q, s, z)\n y = Relu(d) }"
    )
    model = typed(text)
    check(model, {"x": random(4)}, fires=1)
    assert model.graph.initializers["s"].dtype == ir.DataType.FLOAT


def test_bfloat16_is_valid_onnx_and_rounds_to_eight_bits() -> None:
    x = random(3, 16)
    before = run_onnxruntime(mlp(), {"x": x})["y"]
    model = mlp()
    assert NarrowFloats("bfloat16").run(model).changed == 4
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    # ONNX Runtime's CPU provider has no bfloat16 arithmetic; onnx's own evaluator has.
    after = ReferenceEvaluator(proto).run(None, {"x": x})[0]
    worst = np.abs(after - before).max() / np.abs(before).max()
    assert 2**-12 < worst < 8 * 2**-8


def test_a_clone_is_not_touched() -> None:
    model = mlp()
    NarrowFloats().run(model.clone())
    assert {o.dtype for n in model.graph for o in n.outputs} == {ir.DataType.FLOAT}
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("options", [{"dtype": "float8"}, {"headroom": 0.5}])
def test_nonsense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(InternalError, match="no narrow float format"):
        NarrowFloats(**options).run(mlp())  # type: ignore[arg-type]
