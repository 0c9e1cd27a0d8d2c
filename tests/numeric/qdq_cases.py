"""Q/DQ patterns, the steps each must become, and the parameters of its output."""

from __future__ import annotations

import numpy as np
from qdq_models import BIAS, PARAMS, RNG, Case, i8, i32_bias, out, q, qdq, scales, weight

CONV = {"W": i8(4, 3, 3, 3), "sW": scales(4)}
DEPTHWISE = {"W": i8(6, 1, 3, 3), "sW": scales(6)}
MATMUL = {"W": i8(8, 5), "sW": scales(5)}
GEMM_T = {"W": i8(5, 8), "sW": scales(5)}
VECTOR = {"v": RNG.normal(0, 1, 5).astype(np.float32)}
CONST = {"K": RNG.integers(0, 256, (3, 4)).astype(np.uint8)}


def ints(**named: list[int]) -> dict[str, np.ndarray]:
    return {name: np.array(values, np.int64) for name, values in named.items()}


CASES = [
    Case("quantize", out("x", "a"), "[3,4]", "[3,4]", "Quantize Dequantize", "a"),
    Case(
        "conv bias relu",
        qdq("x", "a")
        + weight(0)
        + BIAS
        + "c = Conv<pads=[1,1,1,1], strides=[2,2]>(x_d, w, bias)\nr = Relu(c)\n"
        + out("r", "r"),
        "[2,3,9,8]",
        "[2,4,5,4]",
        "Quantize QConv Dequantize",
        "r",
        CONV | i32_bias(CONV["sW"]),
    ),
    Case(
        "conv same_lower strided, per tensor, int8",
        qdq("x", "b") + weight() + 'c = Conv<auto_pad="SAME_LOWER", strides=[2,1]>(x_d, w)\n' + out("c", "e"),
        "[1,3,8,6]",
        "[1,4,4,6]",
        "Quantize QConv Dequantize",
        "e",
        {"W": CONV["W"], "sW": np.float32(0.002)},
    ),
    Case(
        "depthwise clip",
        qdq("x", "a")
        + weight(0)
        + "c = Conv<group=6, pads=[1,1,1,1]>(x_d, w)\nr = Clip(c, lo, hi)\n"
        + out("r", "c"),
        "[1,6,5,5]",
        "[1,6,5,5]",
        "Quantize QConv Dequantize",
        "c",
        DEPTHWISE | {"lo": np.float32(-0.3), "hi": np.float32(0.52)},
    ),
    Case(
        "conv float output relu",
        qdq("x", "a") + weight(0) + BIAS + "c = Conv(x_d, w, bias)\ny = Relu(c)",
        "[1,3,6,6]",
        "[1,4,4,4]",
        "Quantize QConv",
        None,
        CONV | i32_bias(CONV["sW"]),
    ),
    Case(
        "matmul add relu to float",
        qdq("x", "a") + weight(1) + "m = MatMul(x_d, w)\nb = Add(v, m)\ny = Relu(b)",
        "[2,3,8]",
        "[2,3,5]",
        "Quantize QGemm",
        None,
        MATMUL | VECTOR,
    ),
    Case(
        "matmul add relu to int",
        qdq("x", "a") + weight(1) + "m = MatMul(x_d, w)\nb = Add(v, m)\nr = Relu(b)\n" + out("r", "r"),
        "[2,3,8]",
        "[2,3,5]",
        "Quantize QGemm Dequantize",
        "r",
        MATMUL | VECTOR,
        exact=False,
    ),
    Case(
        "gemm transB int32 bias",
        qdq("x", "b") + weight(0) + BIAS + "g = Gemm<transB=1>(x_d, w, bias)\n" + out("g", "a"),
        "[4,8]",
        "[4,5]",
        "Quantize QGemm Dequantize",
        "a",
        GEMM_T | i32_bias(GEMM_T["sW"], "b"),
    ),
    Case(
        "gemm float bias to float",
        qdq("x", "a") + weight(1) + "y = Gemm(x_d, w, v)",
        "[4,8]",
        "[4,5]",
        "Quantize QGemm",
        None,
        MATMUL | VECTOR,
    ),
    Case(
        "uint8 weight with zero point 128",
        qdq("x", "a") + weight(1) + "m = MatMul(x_d, w)\n" + out("m", "c"),
        "[4,8]",
        "[4,5]",
        "Quantize QGemm Dequantize",
        "c",
        {
            "W": (i8(8, 5).astype(np.int16) + 128).astype(np.uint8),
            "sW": scales(5),
            "zW": np.full(5, 128, np.uint8),
        },
    ),
    Case(
        "two quantizers on one result",
        qdq("x", "a")
        + weight(1)
        + "m = MatMul(x_d, w)\n"
        + q("m", "b")
        + out("m", "c").replace("m_q", "m_r")
        + "y1 = DequantizeLinear(m_q, s_b, z_b)",
        "[4,8]",
        "[4,5]|[4,5]",
        "Quantize QGemm Quantize Quantize Dequantize Dequantize",
        "c",
        MATMUL,
    ),
    Case(
        "shared dequantizer with a float reader",
        qdq("x", "a") + weight(1) + "m = MatMul(x_d, w)\n" + out("m", "c") + "y1 = Softmax(x_d)",
        "[4,8]",
        "[4,5]|[4,8]",
        "Quantize Dequantize QGemm Dequantize FloatIsland",
        "c",
        MATMUL,
    ),
    Case(
        "residual add relu",
        qdq("x", "a") + qdq("x1", "b") + "s = Add(x_d, x1_d)\nr = Relu(s)\n" + out("r", "r"),
        "[2,3,4]|[2,3,4]",
        "[2,3,4]",
        "Quantize Quantize QAdd Dequantize",
        "r",
    ),
    Case(
        "mul broadcast",
        qdq("x", "a") + qdq("x1", "b") + "s = Mul(x_d, x1_d)\n" + out("s", "c"),
        "[2,3,4]|[3,1]",
        "[2,3,4]",
        "Quantize Quantize QMul Dequantize",
        "c",
        exact=False,
    ),
    Case(
        "add quantized constant",
        qdq("x", "a") + "k = DequantizeLinear(K, s_c, z_c)\ns = Add(x_d, k)\n" + out("s", "a"),
        "[2,3,4]",
        "[2,3,4]",
        "Quantize QAdd Dequantize",
        "a",
        CONST,
        exact=False,
    ),
    Case(
        "concat requantizes",
        qdq("x", "a") + qdq("x1", "c") + "k = Concat<axis=-1>(x_d, x1_d)\n" + out("k", "a"),
        "[2,3]|[2,4]",
        "[2,7]",
        "Quantize Quantize QLut QConcat Dequantize",
        "a",
        exact=False,
    ),
    Case(
        "max pool ceil",
        qdq("x", "a")
        + "p = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, pads=[1,0,0,1]>(x_d)\n"
        + out("p", "a"),
        "[1,2,8,7]",
        "[1,2,4,4]",
        "Quantize QPool:max Dequantize",
        "a",
    ),
    Case(
        "average pool without and with padding counted",
        qdq("x", "a")
        + "p = AveragePool<kernel_shape=[3,2], pads=[1,1,1,0], strides=[2,1]>(x_d)\n"
        + qdq("p", "c")
        + "p1 = AveragePool<kernel_shape=[2,2], count_include_pad=1, pads=[1,1,1,1]>(p_d)\n"
        + out("p1", "a"),
        "[1,2,7,6]",
        "[1,2,5,7]",
        "Quantize QPool:average QPool:average Dequantize",
        "a",
        exact=False,
    ),
    Case(
        "global pools",
        qdq("x", "a")
        + "p = GlobalAveragePool(x_d)\n"
        + qdq("p", "c")
        + "m = GlobalMaxPool(p_d)\n"
        + out("m", "c"),
        "[2,3,5,6]",
        "[2,3,1,1]",
        "Quantize QPool:average QPool:max Dequantize",
        "c",
        exact=False,
    ),
    Case(
        "quantized after a transpose",
        "t = Transpose<perm=[1,0]>(x)\nu = Unsqueeze(t, zero)\n" + qdq("u", "a") + "y = Identity(u_d)",
        "[2,3]",
        "[1,3,2]",
        "Quantize Move:transpose Move:reshape Dequantize",
        "a",
        ints(zero=[0]),
    ),
    Case(
        "quantized after a transpose that is read as float too",
        "t = Transpose<perm=[1,0]>(x)\n" + out("t", "a") + "y1 = Exp(t)",
        "[2,3]",
        "[3,2]|[3,2]",
        "FloatIsland Quantize Dequantize",
        "a",
    ),
    Case("requantize", qdq("x", "a") + out("x_d", "b"), "[5]", "[5]", "Quantize QLut Dequantize", "b"),
    Case("equal parameters", qdq("x", "a") + out("x_d", "a"), "[5]", "[5]", "Quantize Dequantize", "a"),
    Case(
        "silu of one tensor",
        qdq("x", "a") + "g = Sigmoid(x_d)\ns = Mul(x_d, g)\n" + out("s", "c"),
        "[64]",
        "[64]",
        "Quantize QLut Dequantize",
        "c",
    ),
    Case(
        "gelu spelled out",
        qdq("x", "a")
        + "d = Div(x_d, r2)\ne = Erf(d)\nf = Add(e, one)\nm = Mul(x_d, f)\nh = Mul(m, half)\n"
        + out("h", "c"),
        "[64]",
        "[64]",
        "Quantize QLut Dequantize",
        "c",
        {"r2": np.float32(2**0.5), "one": np.float32(1), "half": np.array([0.5], np.float32)},
    ),
    Case(
        "movers",
        qdq("x", "a")
        + "t = Transpose<perm=[0,2,1]>(x_d)\nu = Unsqueeze(t, one)\nf = Flatten<axis=2>(u)\n"
        + "s = Slice(f, st, en, ax, sp)\np = Pad(s, pads, fill)\nr = Reshape(p, sh)\n"
        + out("r", "a"),
        "[2,3,4]",
        "[7,2]",
        "Quantize Move:transpose Move:reshape Move:reshape Move:slice Move:pad Move:reshape Dequantize",
        "a",
        ints(one=[1], st=[-1, 1], en=[-99, 99], ax=[0, 1], sp=[-1, 2], pads=[0, 1, 0, 0], sh=[7, -1])
        | {"fill": np.float32(PARAMS["a"][0] * np.float32(-20))},
    ),
    Case(
        "split, squeeze, expand and transpose into a matmul",
        qdq("x", "a")
        + "h, i = Split<axis=0, num_outputs=2>(x_d)\ns = Squeeze(h, zero)\ne = Expand(s, sh)\n"
        + weight(1)
        + "m = MatMul(e, w)\n"
        + out("m", "c"),
        "[2,1,8]",
        "[3,5]",
        "Quantize Move:slice Move:reshape Move:expand QGemm Dequantize",
        "c",
        MATMUL | ints(zero=[0], sh=[3, 8]),
    ),
    Case(
        "relu without quantizer keeps the parameters",
        qdq("x", "a") + "r = Relu(x_d)\n" + weight(1) + "m = MatMul(r, w)\n" + out("m", "c"),
        "[2,8]",
        "[2,5]",
        "Quantize QLut QGemm Dequantize",
        "c",
        MATMUL,
    ),
    Case(
        "conv transpose and 1-D conv stay float",
        qdq("x", "a") + weight(0) + "c = Conv(x_d, w)\n" + out("c", "c"),
        "[1,3,9]",
        "[1,4,7]",
        "Quantize Dequantize FloatIsland Quantize Dequantize",
        "c",
        {"W": i8(4, 3, 3), "sW": scales(4)},
    ),
    Case(
        "sixteen-bit activations stay in an island",
        "xq = QuantizeLinear(x, s_a, z16)\nxd = DequantizeLinear(xq, s_a, z16)\n"
        + weight(1)
        + "y = MatMul(xd, w)",
        "[4,8]",
        "[4,5]",
        "FloatIsland",
        None,
        MATMUL | {"z16": np.uint16(9)},
        opset=21,
    ),
    Case(
        "captured values of a subgraph",
        qdq("x", "a")
        + "t = Transpose(x_d)\nc = ReduceSum<keepdims=0>(x)\nb = Greater(c, nil)\n"
        + "y = If (b) <then_branch = g1 () => (float[4,3] o) { o = Exp(t) },"
        + " else_branch = g2 () => (float[4,3] o2) { o2 = Add(t, k) }>",
        "[3,4]",
        "[4,3]",
        "Quantize Move:transpose Dequantize FloatIsland",
        None,
        {"nil": np.float32(0), "k": np.float32(3)},
        optimises=False,
    ),
]

UNARY = {
    "Sigmoid": "Sigmoid(x_d)",
    "Relu": "Relu(x_d)",
    "LeakyRelu": "LeakyRelu<alpha=0.2>(x_d)",
    "HardSigmoid": "HardSigmoid(x_d)",
    "HardSwish": "HardSwish(x_d)",
    "Tanh": "Tanh(x_d)",
    "Elu": "Elu<alpha=0.7>(x_d)",
    "Softplus": "Softplus(x_d)",
    "Gelu": "Gelu(x_d)",
    "Gelu tanh": 'Gelu<approximate="tanh">(x_d)',
    "Erf": "Erf(x_d)",
    "Clip": "Clip(x_d, lo, hi)",
    "Exp": "Exp(x_d)",
}
LIMITS = {"lo": np.float32(-0.5), "hi": np.float32(0.9)}
CASES += [
    Case(name, qdq("x", "a") + f"u = {call}\n" + out("u", "e"), "[300]", "[300]",
         "Quantize QLut Dequantize", "e", LIMITS, exact=False)
    for name, call in UNARY.items()
]  # fmt: skip
