"""A whole program through Relax and LLVM, its trace mapped back to the program, and float islands."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from lower_helpers import host_target, plain_dot_kernel, run

from bitwright.compiler.errors import InternalError, ToolchainError
from bitwright.compiler.interpret.run import run_program, run_step
from bitwright.compiler.lower.compile import compile_float, compile_module
from bitwright.compiler.lower.island import import_model, importable
from bitwright.compiler.lower.kernel_table import activation_counts, dump_table, load_table, to_logical
from bitwright.compiler.lower.relax_module import build_module
from bitwright.compiler.program.ops import (
    Dequantize,
    FloatIsland,
    Move,
    Program,
    QAdd,
    QConcat,
    QConv,
    QGemm,
    QPool,
    Quantize,
    QuantParams,
    Tensor,
)

rng = np.random.default_rng(3)


def onnx_model(text):
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 17]> {text}'))


def example_program():
    """Quantize, convolutions, Add with a constant, pool, transpose, concat, Gemm, an island."""
    qs = {
        "x": QuantParams("uint8", 0.02, 128),
        "c": QuantParams("uint8", 0.05, 3),
        "k": QuantParams("int8", 0.03, 1),
        "a": QuantParams("uint8", 0.06, 100),
        "g": QuantParams("int8", 0.4, -5),
        "d": QuantParams("uint8", 0.05, 90),
    }
    qs = {name: QuantParams(q.dtype, float(np.float32(q.scale)), q.zero_point) for name, q in qs.items()}
    shapes = {
        "x": ((2, 3, 8, 8), None),
        "xq": ((2, 3, 8, 8), "x"),
        "c": ((2, 8, 8, 8), "c"),
        "d": ((2, 8, 8, 8), "d"),
        "k": ((1, 8, 1, 1), "k"),
        "a": ((2, 8, 8, 8), "a"),
        "p": ((2, 8, 4, 4), "a"),
        "t": ((2, 4, 4, 8), "a"),
        "tt": ((2, 4, 4, 16), "a"),
        "f": ((2, 256), "a"),
        "g": ((2, 5), "g"),
        "gf": ((2, 5), None),
        "y": ((2, 5), None),
    }
    tensors = {
        name: Tensor(name, shape, qs[q].dtype if q else "float32", qs[q] if q else None)
        for name, (shape, q) in shapes.items()
    }

    def weights(*shape):
        return rng.integers(-128, 128, shape, dtype=np.int8)

    def scales(n):
        return rng.uniform(0.001, 0.01, n).astype(np.float32)

    island = onnx_model("g (float[2,5] gf) => (float[2,5] y) { s = Softmax<axis=-1>(gf) y = Add(s, gf) }")
    steps = (
        Quantize(name="q", inputs=("x",), outputs=("xq",)),
        QConv(
            name="conv",
            inputs=("xq",),
            outputs=("c",),
            weight=weights(8, 3, 3, 3),
            weight_scale=scales(8),
            bias=rng.integers(-500, 500, 8).astype(np.int32),
            pads=(1, 1, 1, 1),
            lower=3,
        ),
        QConv(
            name="depthwise",
            inputs=("c",),
            outputs=("d",),
            weight=weights(8, 1, 3, 3),
            weight_scale=scales(8),
            pads=(1, 1, 1, 1),
            group=8,
        ),
        QAdd(name="unused", inputs=("c", "k"), outputs=("e",)),
        QAdd(name="add", inputs=("d", "k"), outputs=("a",), lower=20, upper=250),
        QPool(name="pool", inputs=("a",), outputs=("p",), kind="max", kernel=(2, 2), strides=(2, 2)),
        Move(name="transpose", inputs=("p",), outputs=("t",), kind="transpose", perm=(0, 2, 3, 1)),
        QConcat(name="concat", inputs=("t", "t"), outputs=("tt",), axis=3),
        Move(name="flatten", inputs=("tt",), outputs=("f",), kind="reshape"),
        QGemm(
            name="gemm",
            inputs=("f",),
            outputs=("g",),
            weight=weights(256, 5),
            weight_scale=scales(5),
            lower=-128,
            upper=127,
        ),
        Dequantize(name="dq", inputs=("g",), outputs=("gf",)),
        FloatIsland(name="tail", inputs=("gf",), outputs=("y",), model=island),
    )
    tensors["e"] = Tensor("e", (2, 8, 8, 8), "uint8", qs["a"])
    constants = {"k": rng.integers(-128, 128, (1, 8, 1, 1), dtype=np.int8)}
    return Program(("x",), ("y", "p", "f"), steps, tensors, constants)


def test_program_and_its_trace_equal_the_interpreter():
    program = example_program()
    lowered = build_module(program, None, plain_dot_kernel)
    table = load_table(dump_table(lowered.kernel_table))
    assert table == lowered.kernel_table
    x = rng.normal(0, 2, (2, 3, 8, 8)).astype(np.float32)
    outputs, trace = run(compile_module(lowered.ir_module, host_target()), [x])
    expected = run_program(program, {"x": x}, keep=("gf",))
    np.testing.assert_array_equal(outputs[1], expected["p"])
    np.testing.assert_array_equal(outputs[2], expected["f"])
    # the island is float code: softmax of 5 numbers, within a few roundings of values near 1
    np.testing.assert_allclose(outputs[0], expected["y"], atol=1e-6, rtol=1e-6)
    assert [name for name, _ in trace] == [call.function for call in table]
    check_trace(program, table, trace)
    assert activation_counts(table)[table[0].function] == 1


def check_trace(program, table, trace):
    steps = {step.name: step for step in program.steps}
    seen = {}
    for call, (_, arguments) in zip(table, trace, strict=True):
        inputs = tuple(to_logical(arguments[s.argument], s) for s in call.inputs)
        output = to_logical(arguments[call.output.argument], call.output)
        for stored, array in zip(call.inputs, inputs, strict=True):
            if stored.tensor in seen:
                np.testing.assert_array_equal(array, seen[stored.tensor], err_msg=stored.tensor)
        reference = inputs if call.step is None else run_step(steps[call.step], program, inputs)
        np.testing.assert_array_equal(output, reference[0], err_msg=str(call.step))
        seen[call.output.tensor] = output


def test_layout_decisions_of_the_example():
    table = build_module(example_program(), None, plain_dot_kernel).kernel_table
    # The transpose to NHWC and the reshape behind it are free; the NCHW graph output 'p' costs a conversion.
    assert [call.step or f"layout {call.output.tensor}" for call in table] == [
        "q",
        "conv",
        "depthwise",
        "add",
        "pool",
        "concat",
        "gemm",
        "dq",
        "layout p",
    ]
    assert all(call.function.startswith("bw_") for call in table)


def test_equal_kernels_share_one_function():
    shape, q = (1, 4, 6, 6), QuantParams("uint8", 0.5, 7)
    tensors = {n: Tensor(n, shape, "uint8", q) for n in "abc"} | {"x": Tensor("x", shape, "float32")}
    tensors["b"] = Tensor("b", shape, "uint8", QuantParams("uint8", 0.25, 9))
    steps = (
        Quantize(name="qa", inputs=("x",), outputs=("a",)),
        Quantize(name="qb", inputs=("x",), outputs=("b",)),
        QAdd(name="add", inputs=("a", "b"), outputs=("c",)),
    )
    program = Program(("x",), ("c",), steps, tensors)
    table = build_module(program, None, plain_dot_kernel).kernel_table
    assert [(c.function, c.occurrence) for c in table[:2]] == [(table[0].function, 0), (table[0].function, 1)]
    x = rng.normal(0, 20, shape).astype(np.float32)
    executable = compile_module(build_module(program, None, plain_dot_kernel).ir_module, host_target())
    np.testing.assert_array_equal(run(executable, [x])[0][0], run_program(program, {"x": x})["c"])


ISLANDS = {
    "gather of embeddings": """g (int64[2,6] i) => (float[2,6,4] y)
        <float[5,4] table = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20}> { y = Gather(table, i) }""",
    "attention mask": """g (int64[2,6] i) => (float[2,6] y)
        <int64 zero = {0}, float low = {-1e9}, float high = {1}>
        { b = Equal(i, zero) w = Where(b, low, high) n = Not(b) c = Cast<to=1>(n) y = Mul(w, c) }""",
    "attention": """g (float[2,4,40,32] q, float[2,4,40,32] k) => (float[2,4,40,40] y) <float s = {0.17}>
        { t = Transpose<perm=[0,1,3,2]>(k) m = MatMul(q, t) d = Mul(m, s) y = Softmax<axis=-1>(d) }""",
    "layer norm": """g (float[3,50] x, float[50] w, float[50] b) => (float[3,50] y)
        { y = LayerNormalization<axis=-1, epsilon=1e-5>(x, w, b) }""",
    "rms norm": """g (float[2,7,33] x) => (float[2,7,33] y) <int64[1] a = {-1}, float e = {1e-6}>
        { s = Mul(x, x) m = ReduceMean<axes=[-1]>(s) p = Add(m, e) r = Sqrt(p) y = Div(x, r) }""",
    "gelu": """g (float[3,50] x) => (float[3,50] y) <float h = {0.5}, float o = {1}, float r = {1.4142135}>
        { d = Div(x, r) e = Erf(d) p = Add(e, o) m = Mul(x, p) y = Mul(m, h) }""",
    "activations": """g (float[3,50] x) => (float[3,50] y)
        { a = HardSigmoid<alpha=0.2>(x) b = Sigmoid(x) c = Tanh(x)
          d = HardSwish(x) e = LeakyRelu(x) f = Elu(x)
          y = Sum(a, b, c, d, e, f) }""",
    "views": """g (float[2,6,4] x) => (float[4,5] y)
        <int64[2] s = {8, 6}, int64[2] b = {1, 0}, int64[2] e = {8, 5},
        int64[2] a = {0, 1}, int64[2] t = {2, 1}>
        { r = Reshape(x, s) y = Slice(r, b, e, a, t) }""",
    "rotary": """g (float[1,4,5,8] x, float[5,8] c) => (float[1,4,5,8] y) <int64[2] s = {4, 4}>
        { a, b = Split<axis=-1>(x, s) n = Neg(b) r = Concat<axis=-1>(n, a) u = Cos(c) v = Sin(c)
          p = Mul(x, u) q = Mul(r, v) y = Add(p, q) }""",
    "float layers": """g (float[1,3,12,12] x, float[8,3,3,3] w, float[8,20] m) => (float[1,20] y)
        { c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w) r = Relu(c) p = GlobalAveragePool(r)
          f = Flatten(p) y = Gemm(f, m) }""",
    "pooling and resize": """g (float[1,3,8,8] x) => (float[1,3,8,8] y)
        <float[4] s = {1,1,2,2}, float[0] none = {}>
        { p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x)
          y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric",
                     nearest_mode="floor">(p, none, s) }""",
    "reductions": """g (float[2,7,33] x) => (float[2,1,33] y) <int64[1] a = {1}>
        { m = ReduceMax<axes=[1]>(x) s = ReduceSum(x, a) e = Exp(m) y = Min(s, e) }""",
    "expand and compare": """g (float[3,1] x, float[4] z) => (float[2,3,4] y) <int64[3] s = {2,3,4}>
        { e = Expand(x, s) g = Greater(e, z) y = Where(g, e, z) }""",
}


@pytest.mark.parametrize("name", ISLANDS)
def test_float_islands_agree_with_onnxruntime(name):
    model = onnx_model(ISLANDS[name])
    feeds = []
    for value in model.graph.inputs:
        shape = tuple(value.shape.numpy())
        integer = value.dtype == ir.DataType.INT64
        feeds.append(rng.integers(0, 4, shape) if integer else rng.normal(0, 1, shape).astype(np.float32))
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    expected = session.run(None, {v.name: a for v, a in zip(model.graph.inputs, feeds, strict=True)})
    outputs, _ = run(compile_float(model, host_target()), feeds)
    for found, reference in zip(outputs, expected, strict=True):
        # sums of at most 50 float32 products of order 1, and exp or erf approximations good to about 1e-6
        np.testing.assert_allclose(found, reference, rtol=2e-5, atol=2e-5)


def test_functions_that_tvm_writes_as_a_whole_keep_their_loops():
    # cumulative sums have no block that could be scheduled, and none that is called root
    model = onnx_model("""g (float[4,6] x, int64[4,6] m) => (float[4,6] y) <int64 axis = {1}>
        { c = CumSum(m, axis) f = Cast<to=1>(c) p = Mul(x, f) y = Relu(p) }""")
    x, mask = rng.normal(0, 1, (4, 6)).astype(np.float32), rng.integers(0, 2, (4, 6))
    outputs, _ = run(compile_float(model, host_target()), [x, mask])
    np.testing.assert_array_equal(outputs[0], np.maximum(x * mask.cumsum(1).astype(np.float32), 0))


def test_helper_functions_of_tvm_converters_come_along():
    # Clip, Pad and Tile are imported as calls of TensorIR functions; two islands bring two of each name.
    text = """g (float[2,3] {x}) => (float[4,5] {y})
        <int64[4] p = {{0,1,0,1}}, int64[2] r = {{2,1}}, float l = {{{low}}}, float h = {{1}}>
        {{ a = Clip(x0, l, h) b = Pad(a, p) {y} = Tile(b, r) }}"""
    first = onnx_model(text.format(x="x0", y="y0", low=-1))
    second = onnx_model(text.format(x="x0", y="y1", low=-0.5))
    steps = tuple(
        FloatIsland(name=f"i{k}", inputs=("x0",), outputs=(f"y{k}",), model=model)
        for k, model in enumerate((first, second))
    )
    tensors = {"x0": Tensor("x0", (2, 3), "float32")} | {
        y: Tensor(y, (4, 5), "float32") for y in ("y0", "y1")
    }
    program = Program(("x0",), ("y0", "y1"), steps, tensors)
    x = rng.normal(0, 2, (2, 3)).astype(np.float32)
    module = build_module(program, None, plain_dot_kernel).ir_module
    outputs, _ = run(compile_module(module, host_target()), [x])
    for found, low in zip(outputs, (-1, -0.5), strict=True):
        np.testing.assert_array_equal(found, np.tile(np.pad(np.clip(x, low, 1), ((0, 0), (1, 1))), (2, 1)))


def test_gather_never_reads_outside_its_table():
    model = onnx_model("g (int64[4] i) => (float[4] y) <float[3] table = {5, 6, 7}> { y = Gather(table, i) }")
    indices = np.array([0, -1, 1_000_000_000, -1_000_000_000])
    outputs, _ = run(compile_float(model, host_target()), [indices])
    np.testing.assert_array_equal(outputs[0], [5, 7, 7, 5])


def test_an_operator_tvm_cannot_import_is_named():
    model = onnx_model("g (float[2,3,3] x) => (float[2] y) { a = Relu(x) [the_det] y = Det(a) }")
    island = FloatIsland(name="tail", inputs=("x",), outputs=("y",), model=model)
    assert "'the_det' (Det)" in importable(island)
    with pytest.raises(ToolchainError, match="'the_det'"):
        import_model(model, "tail")
    good = onnx_model("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    assert importable(FloatIsland(name="t", inputs=("x",), outputs=("y",), model=good)) is None


def test_types_that_tvm_infers_wrongly_are_refused():
    # TVM 0.27 gives OneHot the wrong element type: compiled, it would write 8 bytes where 4 are expected
    model = onnx_model("""g (int64[3] i) => (float[3,4] y) <int64 d = {4}, float[2] v = {0, 1}>
        { y = OneHot(i, d, v) }""")
    with pytest.raises(ToolchainError, match="TVM infers float64"):
        import_model(model, "tail")


def test_to_logical_refuses_another_tensor():
    call = build_module(example_program(), None, plain_dot_kernel).kernel_table[0]
    with pytest.raises(InternalError, match="recorded float64"):
        to_logical(np.zeros((2, 8, 8, 3)), call.output)


def test_inputs_and_constants_may_be_outputs():
    q = QuantParams("int8", 0.5, 0)
    tensors = {"x": Tensor("x", (2, 3), "float32"), "k": Tensor("k", (4,), "int8", q)}
    constants = {"k": np.arange(4, dtype=np.int8)}
    program = Program(("x",), ("x", "k", "x"), (), tensors, constants)
    x = rng.normal(0, 1, (2, 3)).astype(np.float32)
    lowered = build_module(program, None, plain_dot_kernel)
    outputs, trace = run(compile_module(lowered.ir_module, host_target()), [x])
    assert not trace and lowered.kernel_table == ()
    for found, expected in zip(outputs, (x, constants["k"], x), strict=True):
        np.testing.assert_array_equal(found, expected)
