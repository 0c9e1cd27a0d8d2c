"""Every target-neutral kernel, bit for bit against numpy written from compiler/program/ops.py."""

import ctypes
from itertools import product

import numpy as np
import pytest

from bitwright.compiler.lower.compile import compile_module
from bitwright.compiler.lower.kernels.elementwise import add
from bitwright.compiler.lower.kernels.reciprocal import multiplies_exactly, reciprocal
from bitwright.compiler.lower.relax_module import build_module
from bitwright.compiler.program.ops import (
    Dequantize,
    Move,
    Program,
    QAdd,
    QConcat,
    QLut,
    QMul,
    QPool,
    Quantize,
    QuantParams,
    Tensor,
)

tvm = pytest.importorskip("tvm")
vm_module = pytest.importorskip("tvm.runtime.vm")


def host_target():
    """The machine the tests run on: its own instructions, because fma must be an instruction, not a call."""
    return {"kind": "llvm", "mcpu": tvm.target.codegen.llvm_get_system_cpu()}


f32 = np.float32
rng = np.random.default_rng(7)
_fmaf = ctypes.CDLL("libm.so.6").fmaf
_fmaf.restype, _fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
fma = np.vectorize(_fmaf, otypes=[np.float32])

U8 = QuantParams("uint8", float(f32(0.0173)), 121)
S8 = QuantParams("int8", float(f32(0.0411)), -7)
OUT_U8 = QuantParams("uint8", float(f32(0.0297)), 93)
OUT_S8 = QuantParams("int8", float(f32(0.0519)), 11)


def integers(shape, quant):
    lo, hi = quant.bounds
    return np.asarray(rng.integers(lo, hi, shape, endpoint=True), quant.dtype)


class Case:
    """Collects independent steps into one program, so that one compilation serves many cases."""

    def __init__(self):
        self.tensors, self.steps, self.feeds, self.expected = {}, [], {}, {}

    def tensor(self, shape, quant=None, dtype="float32"):
        name = f"t{len(self.tensors)}"
        self.tensors[name] = Tensor(name, tuple(shape), quant.dtype if quant else dtype, quant)
        return name

    def feed(self, array, quant=None):
        name = self.tensor(array.shape, quant, array.dtype.name)
        self.feeds[name] = array
        return name

    def stored(self, array, quant, order):
        """Feed ``array`` so that inside the program its bytes lie in ``order``."""
        source = self.feed(array.transpose(order).copy(order="C"), quant)
        return self.add(
            Move,
            (source,),
            array.shape,
            quant,
            kind="transpose",
            perm=tuple(int(a) for a in np.argsort(order)),
        )

    def add(self, operation, inputs, shape, quant, expected=None, **fields):
        output = self.tensor(shape, quant)
        self.steps.append(
            operation(name=f"s{len(self.steps)}", inputs=tuple(inputs), outputs=(output,), **fields)
        )
        if expected is not None:
            self.expected[output] = expected
        return output

    def check(self):
        program = Program(tuple(self.feeds), tuple(self.expected), tuple(self.steps), self.tensors)
        lowered = build_module(program, None, None)
        vm = vm_module.VirtualMachine(compile_module(lowered.ir_module, host_target()), tvm.cpu())
        results = vm["main"](*[tvm.runtime.tensor(a) for a in self.feeds.values()])
        results = [results] if len(self.expected) == 1 else list(results)
        for (name, expected), found in zip(self.expected.items(), results, strict=True):
            step = next(s for s in self.steps if name in s.outputs)
            found = found.numpy()
            assert found.dtype == expected.dtype and found.shape == expected.shape, step
            np.testing.assert_array_equal(found, expected, err_msg=repr(step))
        return lowered


ORDERS = [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)]


def quantized(x, q):
    with np.errstate(over="ignore", invalid="ignore"):
        y = np.clip(np.rint(x / f32(q.scale)) + f32(q.zero_point), *q.bounds)
    return np.where(np.isnan(x), q.bounds[0], y).astype(q.dtype)


def float_samples(shape, q):
    """Ties, saturation, infinities, NaN and random values."""
    x = rng.normal(0, 100 * q.scale, shape).astype(np.float32)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 0.0, -0.0, 1e-45], np.float32)
    ties = (np.arange(-300, 300, dtype=np.float32) + f32(0.5)) * f32(q.scale)
    flat = x.reshape(-1)
    count = min(flat.size // 2, special.size + ties.size)
    flat[: 2 * count : 2] = np.concatenate([special, ties])[:count]
    return x


@pytest.mark.parametrize("q", [U8, S8], ids=["uint8", "int8"])
def test_quantize_and_dequantize(q):
    case = Case()
    for shape in [(2, 5, 7, 9), (1, 3, 40, 33), (37,), (4, 300), (), (1, 16, 1, 1)]:
        x = float_samples(shape, q)
        case.add(Quantize, [case.feed(x)], shape, q, quantized(x, q))
    for shape in [(2, 17, 31, 23), (1, 64, 16, 16), (1, 19, 1, 300)]:  # transposed on the way, in registers
        x = float_samples(shape, q)
        last = case.add(Quantize, [case.feed(x)], shape, q)
        pooled = quantized(x, q).max((2, 3), keepdims=True)
        case.add(QPool, [last], (*shape[:2], 1, 1), q, pooled, kind="max", kernel=shape[2:])
    for shape, orders in [
        ((2, 5, 7, 9), ORDERS),
        ((3, 70), [(0, 1), (1, 0)]),
        ((), [()]),
        ((2, 32, 9, 40), ORDERS),
        ((1, 17, 31, 23), ORDERS),
    ]:
        for order in orders:
            a = integers(shape, q)
            x = (a.astype(np.int32) - q.zero_point).astype(np.float32) * f32(q.scale)
            case.add(Dequantize, [case.stored(a, q, order)], shape, None, x)
    case.check()


def test_quantize_by_multiplication_equals_division():
    # Powers of two have exact reciprocals, the others lie on either side of theirs.
    scales = [
        f32(s)
        for s in (0.25, 0.1, 0.0173, 1 / 3, 0.7, 7.3, 1e-3, 2**-20, 3e-38, 1e-45, *rng.uniform(1e-4, 2, 30))
    ]
    case, multiplied = Case(), 0
    for scale in scales:
        q = QuantParams("uint8", float(scale), 77)
        multiplied += multiplies_exactly(q.scale, q.zero_point, *q.bounds)
        middle = (np.arange(-80, 180) + 0.5) * np.float64(scale)
        near = [np.float32(middle * (1 + k * 2.0**-24)) for k in range(-3, 4)]
        x = np.concatenate([float_samples((64,), q), *near])
        case.add(Quantize, [case.feed(x)], x.shape, q, quantized(x, q))
    assert multiplied > len(scales) // 2
    case.check()


def test_a_reciprocal_keeps_the_sign_of_infinity():
    for scale in (0.25, 0.1, *rng.uniform(1e-4, 10, 200)):
        high, low = reciprocal(scale)
        assert high > 0 and low > 0
        assert abs(float(high) + float(low) - 1 / float(f32(scale))) <= 2.0**-46 / float(f32(scale))


def test_quantize_writes_the_order_its_consumer_wants():
    case = Case()
    x = float_samples((2, 6, 5, 4), U8)
    q = case.add(Quantize, [case.feed(x)], x.shape, U8)
    case.add(
        QPool, [q], (2, 6, 1, 1), U8, quantized(x, U8).max((2, 3), keepdims=True), kind="max", kernel=(5, 4)
    )
    table = case.check().kernel_table
    assert [c.operation for c in table] == ["Quantize", "QPool.max"]
    assert table[0].output.order == (0, 2, 3, 1)


def added(a, qa, b, qb, y, lower, upper):
    ra, rb = f32(qa.scale) / f32(y.scale), f32(qb.scale) / f32(y.scale)
    c = f32(y.zero_point) - (ra * f32(qa.zero_point) + rb * f32(qb.zero_point))
    total = fma(a.astype(np.float32), ra, fma(b.astype(np.float32), rb, c))
    return np.clip(np.rint(total), lower, upper).astype(y.dtype)


def multiplied(a, qa, b, qb, y, lower, upper):
    m = f32(f32(qa.scale) * f32(qb.scale)) / f32(y.scale)
    p = (a.astype(np.int32) - qa.zero_point) * (b.astype(np.int32) - qb.zero_point)
    return np.clip(np.rint(p.astype(np.float32) * m) + f32(y.zero_point), lower, upper).astype(y.dtype)


BROADCASTS = [
    ((2, 6, 5, 7), (2, 6, 5, 7)),
    ((2, 6, 5, 7), (1, 6, 1, 1)),
    ((2, 6, 1, 7), (2, 1, 5, 7)),
    ((2, 6, 5, 7), (5, 7)),
    ((1,), (2, 6, 5, 7)),
    ((), (3, 4)),
    ((2, 3, 11), (3, 1)),
    ((100, 200), (100, 200)),
]


@pytest.mark.parametrize(("kind", "reference"), [(QAdd, added), (QMul, multiplied)])
@pytest.mark.parametrize(("qa", "qb", "qy"), [(U8, S8, OUT_U8), (S8, S8, OUT_S8)], ids=["mixed", "signed"])
def test_add_and_multiply(kind, reference, qa, qb, qy):
    case = Case()
    lower, upper = qy.zero_point, qy.bounds[1] - 3
    for sa, sb in BROADCASTS:
        a, b = integers(sa, qa), integers(sb, qb)
        y = reference(a, qa, b, qb, qy, lower, upper)
        orders = product(ORDERS, ORDERS) if len(sa) == len(sb) == 4 else [(None, None)]
        for oa, ob in orders:
            left = case.feed(a, qa) if oa is None else case.stored(a, qa, oa)
            right = case.feed(b, qb) if ob is None else case.stored(b, qb, ob)
            case.add(kind, [left, right], y.shape, qy, y, lower=lower, upper=upper)
    case.check()


def test_add_equals_numpy_on_every_pair_of_integers():
    case = Case()
    a, b = (
        np.ascontiguousarray(v)
        for v in np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(-128, 128).astype(np.int8))
    )
    for y in (OUT_U8, OUT_S8):
        expected = added(a, U8, b, S8, y, *y.bounds)
        case.add(
            QAdd,
            [case.feed(a, U8), case.feed(b, S8)],
            a.shape,
            y,
            expected,
            lower=y.bounds[0],
            upper=y.bounds[1],
        )
    case.check()


@pytest.mark.parametrize(("qx", "qy"), [(U8, OUT_S8), (S8, OUT_U8)], ids=["u8-s8", "s8-u8"])
def test_look_up(qx, qy):
    case = Case()
    table = integers((256,), qy)
    for order in ORDERS:
        a = integers((2, 6, 5, 70), qx)
        y = table[a.astype(np.int32) - qx.bounds[0]]
        case.add(QLut, [case.stored(a, qx, order)], a.shape, qy, y, table=table, function="any")
    case.check()


def test_concat():
    case = Case()
    for axis in range(4):
        parts = [
            integers(tuple(s if a == axis else d for a, d in enumerate((2, 3, 5, 4))), U8) for s in (1, 6, 2)
        ]
        whole = np.concatenate(parts, axis)
        for orders in [ORDERS, [(0, 2, 3, 1)] * 3]:
            names = [case.stored(p, U8, o) for p, o in zip(parts, orders, strict=True)]
            case.add(QConcat, names, whole.shape, U8, whole, axis=axis)
    a = integers((3, 50), S8)
    name = case.feed(a, S8)
    case.add(QConcat, [name, name], (3, 100), S8, np.concatenate([a, a], -1), axis=-1)
    case.check()


def windows(a, fill, out, step):
    """Yield (position, window values, inside mask) of a pooling step."""
    top, left = step["pads"][:2]
    (kh, kw), (sh, sw), (dh, dw) = step["kernel"], step["strides"], step.get("dilations", (1, 1))
    for oh, ow in product(range(out[2]), range(out[3])):
        at = [(oh * sh - top + i * dh, ow * sw - left + j * dw) for i in range(kh) for j in range(kw)]
        at = [(h, w) for h, w in at if 0 <= h < a.shape[2] and 0 <= w < a.shape[3]]
        yield oh, ow, np.stack([a[:, :, h, w] for h, w in at], -1)


POOLS = [
    ((2, 5, 9, 8), (2, 5, 4, 4), {"kernel": (3, 2), "strides": (2, 2), "pads": (0, 0, 0, 0)}),
    ((1, 20, 7, 7), (1, 20, 7, 7), {"kernel": (3, 3), "strides": (1, 1), "pads": (1, 1, 1, 1)}),
    ((2, 33, 6, 5), (2, 33, 1, 1), {"kernel": (6, 5), "strides": (1, 1), "pads": (0, 0, 0, 0)}),
    ((1, 4, 7, 6), (1, 4, 4, 3), {"kernel": (2, 3), "strides": (2, 2), "pads": (1, 0, 0, 1)}),
    ((1, 4, 8, 8), (1, 4, 5, 5), {"kernel": (2, 2), "strides": (2, 2), "pads": (1, 1, 1, 1)}),
]


@pytest.mark.parametrize("q", [U8, S8], ids=["uint8", "int8"])
def test_max_pool(q):
    case = Case()
    dilated = (
        (1, 6, 9, 9),
        (1, 6, 5, 5),
        {"kernel": (3, 3), "strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (2, 2)},
    )
    for shape, out, step in [*POOLS, dilated]:
        a, y = integers(shape, q), np.empty(out, q.dtype)
        for oh, ow, window in windows(a, None, out, step):
            y[:, :, oh, ow] = window.max(-1)
        case.add(QPool, [case.feed(a, q)], out, q, y, kind="max", **step)
    case.check()


@pytest.mark.parametrize(("qx", "qy"), [(U8, OUT_S8), (S8, OUT_U8)], ids=["u8-s8", "s8-u8"])
@pytest.mark.parametrize("include", [False, True])
def test_average_pool(qx, qy, include):
    case = Case()
    for shape, out, step in POOLS:
        a, y = integers(shape, qx), np.empty(out, qy.dtype)
        for oh, ow, window in windows(a, None, out, step):
            n = step["kernel"][0] * step["kernel"][1] if include else window.shape[-1]
            t = (window.astype(np.int32) - qx.zero_point).sum(-1, dtype=np.int32)
            m = f32(f32(qx.scale) / f32(qy.scale)) / f32(n)
            y[:, :, oh, ow] = np.clip(np.rint(t.astype(np.float32) * m) + f32(qy.zero_point), *qy.bounds)
        name = case.feed(a, qx)
        case.add(QPool, [name], out, qy, y, kind="average", count_include_pad=include, **step)
    case.check()


def test_moves():
    case = Case()
    for q, order in product([U8, S8], ORDERS):
        a = integers((2, 6, 5, 7), q)

        def source(a=a, q=q, order=order):
            return [case.stored(a, q, order)]

        y = a[1:2, 4::-2, :, 1:6:2]
        case.add(Move, source(), y.shape, q, y, kind="slice", starts=(1, 4, 0, 1), steps=(1, -2, 1, 2))
        indices = tuple(
            np.array(i, np.int64) for i in ([0, 1], range(6), [0, 0, 1, 2, 2, 3, 4, 4], [6, 3, 0])
        )
        y = a[np.ix_(*indices)]
        case.add(Move, source(), y.shape, q, y, kind="resize_nearest", indices=indices)
        pads, fill = (0, 1, 2, 0, 0, 0, 1, 3), q.zero_point
        y = np.pad(a, list(zip(pads[:4], pads[4:], strict=True)), constant_values=fill)
        case.add(Move, source(), y.shape, q, y, kind="pad", pads=pads, fill=fill)
        y = np.pad(a, [(0, 0), (0, 0), (0, 1), (0, 0)], constant_values=fill)[:, :, 1:]
        case.add(Move, source(), y.shape, q, y, kind="pad", pads=(0, 0, -1, 0, 0, 0, 1, 0), fill=fill)
        case.add(Move, source(), (4, 3, 5, 7), q, a.reshape(4, 3, 5, 7), kind="reshape")
        case.add(Move, source(), (210, 2), q, a.reshape(210, 2), kind="reshape")
        case.add(
            Move, source(), (7, 5, 2, 6), q, a.transpose(3, 2, 0, 1), kind="transpose", perm=(3, 2, 0, 1)
        )
    b = integers((3, 1, 5), S8)
    y = np.broadcast_to(b, (2, 3, 4, 5)).copy()
    case.add(Move, [case.feed(b, S8)], y.shape, S8, y, kind="expand")
    case.check()


def test_layout_changes_only_where_bytes_differ():
    case = Case()
    a = integers((2, 8, 1, 1), U8)
    pooled = case.add(QPool, [case.feed(a, U8)], a.shape, U8, kind="max", kernel=(1, 1))
    case.add(Move, [pooled], (2, 8), U8, a.reshape(2, 8), kind="reshape")
    assert [c.operation for c in case.check().kernel_table] == ["QPool.max"]

    case = Case()
    a = integers((2, 8, 3, 4), U8)
    once = case.feed(a, U8)
    for _ in range(2):
        case.add(QPool, [once], a.shape, U8, a, kind="max", kernel=(1, 1))
    # one conversion in, shared by both; one out for each graph output
    operations = [c.operation for c in case.check().kernel_table]
    assert operations == ["Layout", "QPool.max", "QPool.max", "Layout", "Layout"]


@pytest.mark.parametrize(
    ("target", "fused", "rounding"),
    [
        ({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}, "vfmadd", "vroundps"),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53"}, "fmla", "frinti"),
    ],
    ids=["avx2", "neon"],
)
def test_exact_primitives_are_vector_instructions_on_every_family(target, fused, rounding):
    case = Case()
    names = [case.feed(integers((4, 256), q), q) for q in (U8, S8)]
    case.add(QAdd, names, (4, 256), OUT_U8, lower=0, upper=255)
    program = Program(tuple(names), (case.steps[0].output,), tuple(case.steps), case.tensors)
    function = add(case.steps[0], program, dict.fromkeys(case.tensors, (0, 1))).function
    built = tvm.compile(function.with_attr("global_symbol", "k"), target=tvm.target.Target(target))
    assembly = built.mod.inspect_source("asm")
    assert fused in assembly and rounding in assembly
    assert "fmaf" not in assembly and "nearbyintf" not in assembly
