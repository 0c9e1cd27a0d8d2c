"""Hand-written float kernels: matrix products, passes over rows, islands that keep the order of their tensors."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import tvm
from lower_helpers import host_target, plain_dot_kernel, run

from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.lower.compile import compile_float, compile_module, optimize
from bitwright.compiler.lower.float.bindings import Bindings
from bitwright.compiler.lower.float.groups import find_groups
from bitwright.compiler.lower.float.row_program import Access, Node, RowProgram, merged
from bitwright.compiler.lower.island import import_model
from bitwright.compiler.lower.relax_module import build_module
from bitwright.compiler.program.ops import FloatIsland, Program, QConv, Quantize, QuantParams, Tensor

EPSILON = 2.0**-24


def onnx_model(text: str, **weights: np.ndarray) -> ir.Model:
    """Return a model from text; inputs that are given as weights become initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> {text}')
    for name, array in weights.items():
        proto.graph.input.remove(next(v for v in proto.graph.input if v.name == name))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def targets() -> list[dict[str, str]]:
    """This machine, and half its vectors where it has AVX-512."""
    host = host_target()
    with_avx2 = "avx2" in tvm.target.codegen.llvm_get_cpu_features(tvm.target.Target(host))
    return [host, {"kind": "llvm", "mcpu": "haswell"}] if with_avx2 else [host]


def shape_text(shape: tuple[int, ...]) -> str:
    return f"float[{','.join(map(str, shape))}]"


# left, right, right is stored transposed
PRODUCTS = [
    ((1, 40), (40, 70), False),
    ((7, 33), (33, 5), False),
    ((50, 64), (64, 96), False),
    ((2, 3, 20, 16), (2, 3, 16, 32), False),
    ((2, 3, 20, 15), (2, 3, 21, 15), True),
    ((3, 18, 32), (3, 40, 32), True),
    ((2, 1, 9, 8), (1, 4, 8, 17), False),
    ((5, 6, 12), (12, 20), False),
]


@pytest.mark.parametrize("constant", [False, True], ids=["variable", "constant"])
def test_products_of_any_shape_lie_within_the_rounding_of_their_sums(constant: bool) -> None:
    rng = np.random.default_rng(0)
    for left, right, transposed in PRODUCTS:
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in (left, right))
        turned = np.swapaxes(b, -1, -2) if transposed else b
        exact = a.astype(np.float64) @ turned.astype(np.float64)
        perm = [*range(len(right) - 2), len(right) - 1, len(right) - 2]
        body = f"t = Transpose<perm={perm}>(b) y = MatMul(a, t)" if transposed else "y = MatMul(a, b)"
        text = (
            f"g ({shape_text(left)} a, {shape_text(right)} b) => ({shape_text(exact.shape)} y) {{ {body} }}"
        )
        model = onnx_model(text, **({"b": b} if constant else {}))
        # k roundings of partial sums no larger than the sum of magnitudes
        bound = (left[-1] + 2) * EPSILON * (np.abs(a).astype(np.float64) @ np.abs(turned))
        for target in targets():
            (found,), _ = run(compile_float(model, target), [a] if constant else [a, b])
            assert np.all(np.abs(found - exact) <= bound), (left, right, target)


def test_bias_and_relu_are_part_of_the_product_and_transposes_of_its_strides() -> None:
    rng = np.random.default_rng(1)
    text = """g (float[2,9,24] x, float[24,40] w, float[40] b) => (float[2,4,9,10] y) <int64[4] s = {2,9,4,10}>
        { m = MatMul(x, w) a = Add(m, b) r = Relu(a) q = Reshape(r, s) y = Transpose<perm=[0,2,1,3]>(q) }"""
    w, b = rng.normal(size=(24, 40)).astype(np.float32), rng.normal(size=40).astype(np.float32)
    x = rng.normal(size=(2, 9, 24)).astype(np.float32)
    model = onnx_model(text, w=w, b=b)
    (found,), _ = run(compile_float(model, host_target()), [x])
    expected = np.maximum(x @ w + b, 0).reshape(2, 9, 4, 10).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    module = optimize(import_model(model, "m"), tvm.target.Target(host_target()))
    names = [v.name_hint for v, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)]
    assert [n for n in names if not n.startswith(("transpose", "reshape", "fused_reshape"))] == [
        "float_matmul"
    ]


ATTENTION = """g (float[1,40,48] q, float[1,40,48] k, float[1,40,48] v, float[1,1,1,40] m) => (float[1,40,48] y)
    <int64[4] s = {1,40,3,16}, int64[3] t = {1,40,48}, float d = {4}>
    { q1 = Reshape(q, s) q2 = Transpose<perm=[0,2,1,3]>(q1) k1 = Reshape(k, s) k2 = Transpose<perm=[0,2,3,1]>(k1)
      v1 = Reshape(v, s) v2 = Transpose<perm=[0,2,1,3]>(v1) a = MatMul(q2, k2) b = Div(a, d) c = Add(b, m)
      e = Softmax<axis=-1>(c) f = MatMul(e, v2) h = Transpose<perm=[0,2,1,3]>(f) y = Reshape(h, t) }"""


def test_attention_is_three_kernels_without_a_copy() -> None:
    model = onnx_model(ATTENTION)
    module = optimize(import_model(model, "attention"), tvm.target.Target(host_target()))
    names = sorted(v.name_hint for v, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc))
    names = [name for name in names if not name.startswith("reshape")]  # views of the same bytes
    assert names == ["float_matmul", "float_matmul1", "float_rows"]
    rng = np.random.default_rng(2)
    feeds = {n: rng.normal(size=(1, 40, 48)).astype(np.float32) for n in "qkv"}
    feeds["m"] = np.where(np.arange(40) < 25, 0, -1e9).astype(np.float32).reshape(1, 1, 1, 40)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (expected,) = session.run(None, feeds)
    for target in targets():
        (found,), _ = run(compile_float(model, target), [feeds[n] for n in "qkvm"])
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("length", [4, 17, 64, 130, 401])
def test_softmax_hides_masked_elements_completely(length: int) -> None:
    text = f"g (float[6,{length}] x) => (float[6,{length}] y) {{ y = Softmax<axis=-1>(x) }}"
    x = np.random.default_rng(3).normal(size=(6, length)).astype(np.float32)
    x[:, 1::2] = [[-np.inf], [-1e9], [-200], [-3e38], [-150], [-1000]]
    (found,), _ = run(compile_float(onnx_model(text), host_target()), [x])
    # Exactly zero: denormal numbers instead would make the product behind a hundred times slower.
    assert np.all(found[:, 1::2] == 0)
    # A row's exponentials are summed in float32, each good to about five roundings.
    np.testing.assert_allclose(found.sum(-1), 1, rtol=16 * EPSILON * np.sqrt(length) + 10 * EPSILON)


ROWS = {
    "layer norm spelled out": (
        """g (float[3,50] x, float[50] w, float[50] b) => (float[3,50] y)
        <int64[1] a = {-1}, float e = {1e-5}, float two = {2}>
        { m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) s = Pow(d, two) v = ReduceMean<axes=[-1]>(s) p = Add(v, e)
          r = Sqrt(p) n = Div(d, r) g = Mul(n, w) y = Add(g, b) }""",
        1,
    ),
    "rms norm": (
        """g (float[2,7,33] x, float[33] w) => (float[2,7,33] y) <float e = {1e-6}, float two = {2}>
        { s = Pow(x, two) m = ReduceMean<axes=[-1]>(s) p = Add(m, e) r = Sqrt(p) q = Div(x, r) y = Mul(w, q) }""",
        1,
    ),
    "swiglu": (
        "g (float[5,33] x, float[5,33] z) => (float[5,33] y) { s = Sigmoid(x) a = Mul(x, s) y = Mul(a, z) }",
        1,
    ),
    # the sum is read twice: once for the norm, once behind it
    "residual": (
        """g (float[3,64] x, float[3,64] r, float[64] w, float[64] b) => (float[3,64] y)
        { s = Add(x, r) n = LayerNormalization<axis=-1>(s, w, b) t = Tanh(n) y = Add(s, t) }""",
        1,
    ),
    # a result of its own and the input of another: two passes
    "two results": (
        "g (float[3,20] x) => (float[3,20] y, float[3,20] z) { y = Exp(x) z = Add(y, x) }",
        2,
    ),
    # rows of one element: they are made one row
    "one element a row": (
        "g (float[2,9,1,1] x, float[1,9,1,1] w) => (float[2,9,1,1] y) { s = Mul(x, w) y = Sigmoid(s) }",
        1,
    ),
    # one number a row is not read with the row's shape
    "mask": (
        """g (float[2,3,16] x, float[2,1,16] m) => (float[2,3,16] y) <float o = {1}, float l = {-100}>
        { n = Sub(o, m) s = Mul(n, l) a = Add(x, s) y = Softmax<axis=-1>(a) }""",
        2,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_chains_are_gathered_into_passes_over_rows(name: str) -> None:
    text, passes = ROWS[name]
    model = onnx_model(text)
    rng = np.random.default_rng(4)
    feeds = {v.name: rng.normal(size=v.shape.numpy()).astype(np.float32) for v in model.graph.inputs}  # type: ignore[union-attr]
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, feeds)
    for target in targets():
        found, _ = run(compile_float(model, target), list(feeds.values()))
        for ours, theirs in zip(found, expected, strict=True):
            # sums of at most 64 float32 numbers and functions good to a few roundings
            np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)
    module = optimize(import_model(model, name), tvm.target.Target(host_target()))
    assert sum("float_rows" in v.name_hint for v in module.get_global_vars()) == passes


def test_groups_are_independent_of_each_other_in_no_circle() -> None:
    # b is read inside the chain and by the reduction over another axis, whose result the chain reads, too
    text = """g (float[8,20] x) => (float[8,20] y)
        { a = Exp(x) b = Mul(a, x) r = ReduceMax<axes=[0]>(b) y = Add(b, r) }"""
    model = onnx_model(text)
    x = np.random.default_rng(5).normal(size=(8, 20)).astype(np.float32)
    (found,), _ = run(compile_float(model, host_target()), [x])
    b = np.exp(x) * x
    np.testing.assert_allclose(found, b + b.max(0), rtol=2e-6, atol=1e-6)
    groups = find_groups(Bindings(import_model(model, "g")["main"]))
    assert len(groups) == 2


def test_rows_that_lie_one_after_the_other_are_one() -> None:
    nodes = (Node("load"), Node("exp", (0,)))
    whole = Access((2, 3, 5), (15, 5, 1))
    assert merged(RowProgram((2, 3, 5), (whole,), whole, nodes)).extents == (30,)
    per_column = Access((5,), (0, 0, 1))
    assert merged(RowProgram((2, 3, 5), (per_column,), whole, nodes)).extents == (6, 5)
    turned = Access((3, 2, 5), (5, 10, 1))
    assert merged(RowProgram((2, 3, 5), (turned,), whole, nodes)).extents == (2, 3, 5)


def test_long_chains_of_functions_compile_in_time() -> None:
    # Expressions are trees: without values held in between, each function would multiply their size.
    chain = "x0 = Tanh(x) " + " ".join(
        f"x{k + 1} = {('Erf', 'Sigmoid', 'Tanh')[k % 3]}(x{k})" for k in range(12)
    )
    text = f"g (float[64,256] x) => (float[64,256] y) {{ {chain} y = Softmax<axis=-1>(x12) }}"
    start = time.process_time()
    compile_float(onnx_model(text), host_target())
    # Half a second on an idle core; expanded, the trees take longer than anyone waits.
    assert time.process_time() - start < 15


def gelu_program(shape: tuple[int, ...]) -> Program:
    """A convolution with a float result, Gelu, and the quantizer of the next convolution."""
    rng = np.random.default_rng(6)
    qx = QuantParams("uint8", 0.125, 128)
    island = onnx_model(
        f"g ({shape_text(shape)} c) => ({shape_text(shape)} g)"
        "<float h = {0.5}, float o = {1}, float r = {1.4142135}>"
        "{ d = Div(c, r) e = Erf(d) p = Add(e, o) m = Mul(c, p) g = Mul(m, h) }"
    )
    channels = shape[1]
    conv = {
        "weight": rng.integers(-99, 100, (channels, channels, 1, 1), dtype=np.int8),
        "weight_scale": np.full(channels, 0.003, np.float32),
    }
    tensors = {"x": Tensor("x", shape, "float32"), "xq": Tensor("xq", shape, "uint8", qx)}
    tensors |= {n: Tensor(n, shape, "float32") for n in ("c", "g")}
    tensors |= {n: Tensor(n, shape, "uint8", qx) for n in ("gq", "y")}
    steps = (
        Quantize(name="q", inputs=("x",), outputs=("xq",)),
        QConv(name="first", inputs=("xq",), outputs=("c",), **conv),  # type: ignore[arg-type]
        FloatIsland(name="gelu", inputs=("c",), outputs=("g",), model=island),
        Quantize(name="q2", inputs=("g",), outputs=("gq",)),
        QConv(name="second", inputs=("gq",), outputs=("y",), **conv),  # type: ignore[arg-type]
    )
    return Program(("x",), ("y",), steps, tensors)


def test_an_elementwise_island_between_convolutions_changes_no_order() -> None:
    shape = (1, 24, 5, 6)
    program = gelu_program(shape)
    lowered = build_module(program, None, plain_dot_kernel)  # type: ignore[arg-type]
    # only the graph's output is turned back
    assert [c.output.tensor for c in lowered.kernel_table if c.operation == "Layout"] == ["y"]
    x = np.random.default_rng(7).normal(0, 4, shape).astype(np.float32)
    (found,), _ = run(compile_module(lowered.ir_module, host_target()), [x])
    expected = run_program(program, {"x": x})["y"]
    # Gelu differs by roundings, so an element may fall on the other side of a quantization step: of 24 inputs a few.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert np.mean(found != expected) < 0.01
