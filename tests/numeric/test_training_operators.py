"""Every operator of the trainable module against ONNX Runtime."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch: pip install bitwright[qat]")
torch.set_num_threads(1)

from bitwright.compiler.errors import ModelError  # noqa: E402
from bitwright.compiler.ort.session import SessionConfig, open_session, run  # noqa: E402
from bitwright.compiler.training.graph_module import GraphModule  # noqa: E402
from bitwright.compiler.training.operators import OPERATORS  # noqa: E402
from bitwright.passes.lift_constants import LiftConstants  # noqa: E402

# float32 sums of at most 200 products in another order.
BOUND = 1e-5
HEADER = '<ir_version: 10, opset_import: ["" : 21]>'

# A case: its name, its inputs, and nodes that make y of them.
CASES_TEXT = """
conv_strided: float[2, 4, 9, 9] x, float[6, 4, 3, 3] w, float[6] b
    y = Conv <strides = [2, 2], pads = [0, 0, 1, 1]> (x, w, b)

conv_depthwise: float[2, 4, 9, 9] x, float[4, 1, 3, 3] w
    y = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w)

conv_dilated: float[2, 4, 12] x, float[6, 4, 3] w
    y = Conv <dilations = [2]> (x, w)

conv_same_upper: float[1, 2, 8, 7] x, float[3, 2, 3, 2] w
    y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)

conv_same_lower: float[1, 2, 8, 7] x, float[3, 2, 4, 2] w
    y = Conv <auto_pad = "SAME_LOWER"> (x, w)

gemm: float[3, 5] x, float[4, 5] w, float[4] b
    y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)

gemm_transposed: float[5, 3] x, float[5, 4] w
    y = Gemm <transA = 1> (x, w)

matmul: float[2, 3, 5] x, float[2, 5, 4] w
    y = MatMul (x, w)

max_pool: float[1, 2, 7, 7] x
    y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 0, 1]> (x)

average_pool: float[1, 2, 7, 7] x
    y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)

average_pool_counted: float[1, 2, 7, 7] x
    y = AveragePool <kernel_shape = [3, 2], count_include_pad = 1, pads = [1, 0, 0, 1]> (x)

global_pools: float[1, 2, 7, 7] x
    a = GlobalAveragePool (x)
    c = GlobalMaxPool (x)
    y = Sub (a, c)

batch_normalization: float[2, 3, 4] x, float[3] w, float[3] b, float[3] m, float[3] v
    a = Abs (v)
    y = BatchNormalization (x, w, b, m, a)

layer_normalization: float[2, 3, 8] x, float[8] w, float[8] b
    y = LayerNormalization <epsilon = 0.001> (x, w, b)

softmaxes: float[2, 3, 8] x
    a = Softmax <axis = 1> (x)
    c = LogSoftmax (x)
    y = Add (a, c)

reductions: float[2, 3, 8] x
    i = Constant <value = int64[1] {-1}> ()
    a = ReduceMean (x, i)
    c = ReduceSum <keepdims = 0> (x)
    d = ReduceMax (x, i)
    e = ReduceMin <keepdims = 1> (x, i)
    h = ReduceL2 (x, i)
    f = Add (a, c)
    g = Mul (d, e)
    j = Mul (g, h)
    y = Add (f, j)

activations: float[4, 9] x
    a = Relu (x)
    c = LeakyRelu <alpha = 0.2> (x)
    d = Sigmoid (x)
    e = HardSigmoid (x)
    f = HardSwish (x)
    g = Gelu (x)
    h = Gelu <approximate = "tanh"> (x)
    j = Tanh (x)
    y = Concat <axis = 1> (a, c, d, e, f, g, h, j)

functions: float[4, 9] x
    a = Abs (x)
    c = Sqrt (a)
    d = Log (a)
    e = Exp (x)
    f = Erf (x)
    g = Neg (x)
    h = Cos (x)
    j = Sin (x)
    k = Reciprocal (x)
    y = Concat <axis = 0> (c, d, e, f, g, h, j, k)

pairs: float[4, 9] x, float[9] w
    a = Add (x, w)
    c = Sub (x, w)
    d = Mul (x, w)
    e = Div (x, w)
    f = Max (x, w)
    g = Min (x, w)
    y = Concat <axis = 0> (a, c, d, e, f, g)

powers: float[4, 9] x
    s = Constant <value = float {2.0}> ()
    t = Constant <value = float {1.5}> ()
    a = Pow (x, s)
    y = Pow (a, t)

clips: float[4, 9] x
    s = Constant <value = float {0.5}> ()
    t = Constant <value = float {-0.25}> ()
    a = Clip (x, t)
    c = Clip (x, , s)
    d = Clip (x, t, s)
    e = Add (a, c)
    y = Add (e, d)

comparisons: float[4, 9] x, float[9] w
    a = Less (x, w)
    c = LessOrEqual (x, x)
    d = Greater (x, w)
    e = GreaterOrEqual (w, x)
    f = Equal (x, x)
    g = And (a, c)
    h = Or (d, g)
    j = Not (e)
    k = And (f, j)
    l = And (k, h)
    m = Cast <to = 1> (l)
    y = Where (h, m, x)

moves: float[2, 3, 4] x
    i = Constant <value = int64[2] {0, -1}> ()
    a = Transpose <perm = [2, 0, 1]> (x)
    c = Reshape (a, i)
    k = Constant <value = int64[1] {1}> ()
    d = Unsqueeze (c, k)
    e = Squeeze (d, k)
    f = Flatten <axis = 0> (e)
    y = Transpose (f)

slices: float[6, 8] x
    s = Constant <value = int64[2] {1, -6}> ()
    t = Constant <value = int64[2] {100, -1}> ()
    i = Constant <value = int64[2] {0, 1}> ()
    k = Constant <value = int64[2] {2, 3}> ()
    y = Slice (x, s, t, i, k)

splits: float[7, 4] x
    a, c = Split <num_outputs = 2> (x)
    i = Constant <value = int64[2] {1, 2}> ()
    d, e = Split (c, i)
    y = Concat <axis = 0> (e, d, a)

gathers: float[6, 4] x
    i = Constant <value = int64[2, 2] {0, -1, 3, 3}> ()
    a = Gather (x, i)
    k = Constant <value = int64 {-2}> ()
    y = Gather <axis = 2> (a, k)

shapes: float[2, 3] x
    a = Shape (x)
    k = Constant <value = int64[1] {1}> ()
    c = Concat <axis = 0> (k, a)
    d = Expand (x, c)
    e = ConstantOfShape (a)
    f = Shape <start = -1> (x)
    g = Cast <to = 1> (f)
    h = Add (d, e)
    y = Add (h, g)

ranges: float[2, 3] x
    s = Constant <value = float {0.0}> ()
    l = Constant <value = float {3.0}> ()
    k = Constant <value = float {1.0}> ()
    a = Range (s, l, k)
    y = Mul (a, x)

pads: float[2, 3] x
    i = Constant <value = int64[4] {1, 0, 0, 2}> ()
    s = Constant <value = float {2.5}> ()
    a = Pad (x, i, s)
    k = Constant <value = int64[1] {-1}> ()
    j = Constant <value = int64[2] {1, 1}> ()
    y = Pad (a, j, , k)

triangles: float[4, 4] x
    k = Constant <value = int64 {1}> ()
    a = Trilu (x, k)
    c = Trilu <upper = 0> (x)
    y = Sub (a, c)

integers: float[4, 2] x
    a = Shape (x)
    k = Constant <value = int64[1] {-3}> ()
    c = Div (a, k)
    d = Cast <to = 1> (c)
    y = Mul (x, d)

identities: float[4, 4] x
    a = Identity (x)
    y = Dropout (a)
"""


def parsed(text):
    """Return name -> (inputs, nodes)."""
    blocks = [block.split("\n", 1) for block in text.strip().split("\n\n")]
    return {head.partition(": ")[0]: (head.partition(": ")[2], nodes) for head, nodes in blocks}


CASES = parsed(CASES_TEXT)
REFUSED = parsed("""
ceil_mode: float[1, 2, 7, 7] x
    y = MaxPool <kernel_shape = [3, 3], ceil_mode = 1> (x)

constant: float[2, 3] x
    i = Constant <value = int64[4] {1, 0, 0, 1}> ()
    y = Pad <mode = "edge"> (x, i)

backwards: float[4] x
    i = Constant <value = int64[1] {-1}> ()
    s = Constant <value = int64[1] {3}> ()
    e = Constant <value = int64[1] {0}> ()
    a = Constant <value = int64[1] {0}> ()
    y = Slice (x, s, e, a, i)
""")
RMS = ("float[2, 3, 8] x, float[8] w", "y = RMSNormalization (x, w)")


def module_and_feeds(inputs, nodes, header=HEADER):
    outputs = "float[N] y" if "y" in nodes else ""
    proto = onnx.parser.parse_model(f"{header}\nnet ({inputs}) => ({outputs}) {{\n{nodes}\n}}")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = ir.from_proto(proto)
    rng = np.random.default_rng(3)
    feeds = {
        v.name: (rng.normal(0, 1, v.shape.numpy()) + 0.05).astype(np.float32) for v in model.graph.inputs
    }
    LiftConstants().run(model)
    return model, feeds


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_onnx_runtime_computes(name):
    model, feeds = module_and_feeds(*CASES[name])
    expected = run(open_session(model, SessionConfig()), feeds)["y"]
    found = GraphModule(model)({n: torch.from_numpy(a) for n, a in feeds.items()})["y"].detach().numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=BOUND, atol=BOUND)


def test_rms_normalization_is_its_definition():
    model, feeds = module_and_feeds(*RMS, header='<ir_version: 11, opset_import: ["" : 23]>')
    x, w = feeds["x"], feeds["w"]
    found = GraphModule(model)({n: torch.from_numpy(a) for n, a in feeds.items()})["y"].detach().numpy()
    np.testing.assert_allclose(found, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w, rtol=BOUND)


def test_every_operator_is_compared():
    used = {n.op_type for inputs, nodes in CASES.values() for n in module_and_feeds(inputs, nodes)[0].graph}
    assert set(OPERATORS) - used == {"RMSNormalization"}


def test_an_operator_that_cannot_be_trained_is_named():
    model, _ = module_and_feeds("float[4, 4] x", "y = Det (x)")
    next(iter(model.graph)).name = "the_det"
    with pytest.raises(ModelError, match="node 'the_det': Det cannot be trained"):
        GraphModule(model)


@pytest.mark.parametrize("why", REFUSED)
def test_a_form_that_cannot_be_trained_is_named(why):
    model, feeds = module_and_feeds(*REFUSED[why])
    with pytest.raises(ModelError, match=why):
        GraphModule(model)({n: torch.from_numpy(a) for n, a in feeds.items()})
