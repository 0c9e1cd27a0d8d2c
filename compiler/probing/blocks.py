"""Small models that hold every operator a profile has kernels for, in the company it usually keeps.

An operator alone in a model says little: a residual Add has an integer kernel only between integer operators, and a
convolution's time depends on the layout its neighbours leave. So the micro-benchmarks are blocks, over sizes that are
spaced by factors of two to four.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from bitwright.passes.rewriting import add_initializer

_HEAD = '<ir_version: 10, opset_import: ["": 20]>\n'


@dataclass(frozen=True)
class Block:
    """A block at one size.

    Attributes:
        label: What it is, in words.
        text: The model as ONNX text; every input but ``x`` becomes a constant.
    """

    label: str
    text: str

    def model(self) -> ir.Model:
        """Return the model, with weights of plausible size."""
        model = ir.from_proto(onnx.parser.parse_model(_HEAD + self.text))
        generator = np.random.default_rng(0)
        for value in list(model.graph.inputs)[1:]:
            assert value.shape is not None and value.name is not None
            shape = value.shape.numpy()
            array = generator.normal(scale=np.prod(shape[1:]) ** -0.5, size=shape).astype(np.float32)
            model.graph.inputs.remove(value)
            value.replace_all_uses_with(add_initializer(model.graph, value.name, array))
        return model


def blocks() -> Iterator[Block]:
    """Yield every block, the sizes that matter most first."""
    shapes = [(64, 8), (16, 48), (32, 12), (128, 12), (16, 16), (64, 25), (256, 4)]
    linears = [
        (64, 384, 1536),
        (1, 256, 64),
        (16, 128, 512),
        (128, 128, 512),
        (1, 1024, 1024),
        (8, 64, 256),
        (256, 64, 256),
    ]
    for conv, linear in zip(shapes, linears, strict=True):
        yield _convolutional(*conv)
        yield _linear(*linear)


def _convolutional(channels: int, size: int) -> Block:
    """Dense, depthwise and pointwise convolution, residual Add, gate, pooling, classifier."""
    c, h, half = channels, size, (size + 1) // 2
    text = f"""conv_block (float[1,{c},{h},{h}] x, float[{c},{c},3,3] dense, float[{c}] b0, float[{c},1,3,3] deep,
        float[{c}] b1, float[{c},{c},1,1] point, float[{c}] b2, float[{c},{c},3,3] strided, float[{c}] b3,
        float[{2 * c},{c},1,1] wide, float[{2 * c}] b4, float[10,{2 * c}] fc, float[10] b5)
        => (float[1,10] y) <int64[1] first = {{0}}, int64[1] last = {{{c}}}, int64[1] channels = {{1}}> {{
      d = Conv<pads=[1,1,1,1]>(x, dense, b0)
      dr = Relu(d)
      s = Conv<pads=[1,1,1,1], group={c}>(dr, deep, b1)
      sr = Relu(s)
      p = Conv(sr, point, b2)
      a = Add(p, dr)
      ar = Relu(a)
      t = Conv<pads=[1,1,1,1], strides=[2,2]>(ar, strided, b3)
      g = Sigmoid(t)
      m = Mul(t, g)
      k = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(m)
      n = Concat<axis=1>(m, k)
      v = Slice(n, first, last, channels)
      w = Conv(v, wide, b4)
      wr = LeakyRelu(w)
      q = GlobalAveragePool(wr)
      f = Flatten(q)
      y = Gemm<transB=1>(f, fc, b5)
    }}"""
    return Block(f"convolutions {c}x{half}x{half} to {c}x{h}x{h}", text)


def _linear(rows: int, width: int, inner: int) -> Block:
    """Two linear layers with a Gelu, an attention product with Softmax, a residual Add, a LayerNormalization.

    No Add stands before the LayerNormalization: at fixed shapes ONNX Runtime makes one kernel of the two, at dynamic
    ones it does not, and the two differ by a multiple.
    """
    t, n, m = rows, width, inner
    text = f"""linear_block (float[1,{t},{n}] x, float[{n},{n}] wq, float[{n}] bq, float[{n},{m}] w1, float[{m}] b1,
        float[{m},{n}] w2, float[{n}] b2, float[{n}] gain, float[{n}] shift) => (float[1,{t},{n}] y)
        <float root = {{1.41421}}, float one = {{1.0}}, float half = {{0.5}}> {{
      q0 = MatMul(x, wq)
      q = Add(q0, bq)
      k = Transpose<perm=[0,2,1]>(q)
      s0 = MatMul(q, k)
      s = Softmax(s0)
      o = MatMul(s, q)
      r = Sub(o, x)
      l = LayerNormalization(r, gain, shift)
      i0 = MatMul(l, w1)
      i = Add(i0, b1)
      e0 = Div(i, root)
      e1 = Erf(e0)
      e2 = Add(e1, one)
      e3 = Mul(i, e2)
      g = Mul(e3, half)
      u0 = MatMul(g, w2)
      u = Add(u0, b2)
      y = Add(u, l)
    }}"""
    return Block(f"linear layers {t}x{n} to {t}x{m}", text)
