"""Every step of the interpreter against loops that spell out its definition."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from bitwright.compiler.errors import DataError
from bitwright.compiler.interpret.run import run_program, run_step
from bitwright.compiler.program.affine import dequantize, quantize
from bitwright.compiler.program.ops import (
    Dequantize,
    Move,
    Program,
    QAdd,
    QConcat,
    QConv,
    QGemm,
    QLut,
    QMul,
    QPool,
    Quantize,
    QuantParams,
    Step,
    Tensor,
)

F = np.float32
U = QuantParams("uint8", float(F(0.0213)), 117)
S = QuantParams("int8", float(F(0.0371)), -9)
Y = QuantParams("uint8", float(F(0.0454)), 88)


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def integers(quant: QuantParams, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    low, high = quant.bounds
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(quant.dtype)


def tensor(name: str, shape: tuple[int, ...], quant: QuantParams | None) -> Tensor:
    return Tensor(name, shape, "float32" if quant is None else quant.dtype, quant)


def run(step: Step, tensors: list[Tensor], *inputs: np.ndarray) -> np.ndarray:
    program = Program(step.inputs, step.outputs, (step,), {t.name: t for t in tensors})
    (result,) = run_step(step, program, inputs)
    target = program.tensor(step.output)
    assert result.shape == target.shape
    assert result.dtype.name == target.dtype
    whole = run_program(program, dict(zip(step.inputs, inputs, strict=True)))
    np.testing.assert_array_equal(whole[step.output], result)
    return result


def half_even(x: Fraction) -> int:
    return round(x)


def positions(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, shape))


def requantize(acc: int, factor: np.float32, zero: int, lower: int, upper: int) -> int:
    scaled = F(F(acc) * factor)
    return min(max(half_even(Fraction(float(scaled))) + zero, lower), upper)


def f32_fma(a: float, b: float, c: float) -> np.float32:
    """Exact in rationals; rounding to float64 first matters only beside a tie, which this data has not."""
    return F(float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    params = QuantParams("int8", 1.0, 1)
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, np.nan, np.inf, -np.inf, 3.4e38], np.float32)
    tensors = [tensor("x", x.shape, None), tensor("q", x.shape, params)]
    found = run(Quantize(name="q", inputs=("x",), outputs=("q",)), tensors, x)
    assert found.tolist() == [1, 3, 3, 1, -1, 127, -128, -128, 127, -128, 127]


def test_dequantize() -> None:
    q = np.arange(256).astype(np.uint8)
    step = Dequantize(name="d", inputs=("q",), outputs=("x",))
    found = run(step, [tensor("q", q.shape, U), tensor("x", q.shape, None)], q)
    assert found.tolist() == [float(F(F(int(v) - 117) * F(U.scale))) for v in q]
    np.testing.assert_array_equal(quantize(found, U), q)


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7)])
def test_gemm_to_integers(shape: tuple[int, ...]) -> None:
    x, w = integers(U, shape), integers(QuantParams("int8", 1, 0), (7, 5), 1)
    sw, bias = rng().uniform(0.001, 0.01, 5).astype(np.float32), np.arange(5, dtype=np.int32) * 700 - 900
    step = QGemm(
        name="g", inputs=("x",), outputs=("y",), weight=w, weight_scale=sw, bias=bias, lower=80, upper=200
    )
    found = run(step, [tensor("x", shape, U), tensor("y", (*shape[:-1], 5), Y)], x)
    for at in positions(found.shape):
        acc = int(bias[at[-1]]) + sum((int(x[(*at[:-1], k)]) - 117) * int(w[k, at[-1]]) for k in range(7))
        factor = F(F(F(U.scale) * sw[at[-1]]) / F(Y.scale))
        assert found[at] == requantize(acc, factor, 88, 80, 200)


@pytest.mark.parametrize("relu", [False, True])
def test_gemm_to_float(relu: bool) -> None:
    x, w = integers(S, (3, 6)), integers(QuantParams("int8", 1, 0), (6, 4), 1)
    sw, added = rng().uniform(0.001, 0.01, 4).astype(np.float32), rng().normal(0, 1, 4).astype(np.float32)
    step = QGemm(
        name="g", inputs=("x",), outputs=("y",), weight=w, weight_scale=sw, float_bias=added, relu=relu
    )
    found = run(step, [tensor("x", (3, 6), S), tensor("y", (3, 4), None)], x)
    for row, col in positions((3, 4)):
        acc = sum((int(x[row, k]) + 9) * int(w[k, col]) for k in range(6))
        expected = f32_fma(acc, F(F(S.scale) * sw[col]), added[col])
        assert found[row, col] == (max(expected, F(0)) if relu else expected)


@pytest.mark.parametrize(
    ("group", "strides", "pads", "dilations"),
    [
        (1, (1, 1), (0, 0, 0, 0), (1, 1)),
        (2, (2, 1), (1, 0, 2, 1), (1, 1)),
        (4, (1, 2), (1, 1, 1, 1), (1, 2)),
        (1, (2, 2), (0, 2, 1, 0), (2, 1)),
    ],
)
def test_conv(group: int, strides: tuple, pads: tuple, dilations: tuple) -> None:
    x, w = integers(U, (2, 4, 6, 7)), integers(QuantParams("int8", 1, 0), (4, 4 // group, 3, 2), 1)
    sw = rng().uniform(0.001, 0.01, 4).astype(np.float32)
    bias = np.array([5, -800, 3000, 0], np.int32)
    geometry = {"group": group, "strides": strides, "pads": pads, "dilations": dilations}
    step = QConv(name="c", inputs=("x",), outputs=("y",), weight=w, weight_scale=sw, bias=bias, **geometry)
    size = [
        (6 + pads[0] + pads[2] - 2 * dilations[0] - 1) // strides[0] + 1,
        (7 + pads[1] + pads[3] - dilations[1] - 1) // strides[1] + 1,
    ]
    found = run(step, [tensor("x", x.shape, U), tensor("y", (2, 4, *size), Y)], x)
    for n, o, i, j in positions(found.shape):
        acc = int(bias[o])
        for c, kh, kw in positions((4 // group, 3, 2)):
            row = i * strides[0] - pads[0] + kh * dilations[0]
            col = j * strides[1] - pads[1] + kw * dilations[1]
            if 0 <= row < 6 and 0 <= col < 7:
                channel = o // (4 // group) * (4 // group) + c
                acc += (int(x[n, channel, row, col]) - 117) * int(w[o, c, kh, kw])
        factor = F(F(F(U.scale) * sw[o]) / F(Y.scale))
        assert found[n, o, i, j] == requantize(acc, factor, 88, 0, 255)


def test_accumulation_is_exact_at_the_int32_limit() -> None:
    """255 * 127 * 66000 is close to 2**31, far beyond float32's exact integers."""
    k = 66000
    wide = QuantParams("uint8", 1.0, 0)
    w = np.full((k, 2), 127, np.int8)
    w[0, 1] = 126
    step = QGemm(name="g", inputs=("x",), outputs=("y",), weight=w, weight_scale=np.ones(2, np.float32))
    step_int = QGemm(
        name="g",
        inputs=("x",),
        outputs=("y",),
        weight=w,
        weight_scale=np.ones(2, np.float32),
        bias=np.array([-255 * 127 * k + 1, -255 * 127 * k + 256], np.int32),
    )
    x = np.full((1, k), 255, np.uint8)
    tensors = [tensor("x", x.shape, wide), tensor("y", (1, 2), None)]
    assert run(step, tensors, x).tolist() == [[float(F(255 * 127 * k)), float(F(255 * 127 * k - 255))]]
    assert run(step_int, tensors, x).tolist() == [[1.0, 1.0]]


def test_add_broadcasts() -> None:
    a, b = integers(U, (3, 4, 5)), integers(S, (4, 1), 1)
    step = QAdd(name="a", inputs=("a", "b"), outputs=("y",), lower=88, upper=250)
    found = run(step, [tensor("a", a.shape, U), tensor("b", b.shape, S), tensor("y", a.shape, Y)], a, b)
    ra, rb = F(F(U.scale) / F(Y.scale)), F(F(S.scale) / F(Y.scale))
    c = F(F(88) - F(F(ra * F(117)) + F(rb * F(-9))))
    for at in positions(a.shape):
        total = f32_fma(int(a[at]), ra, f32_fma(int(b[at[1], 0]), rb, c))
        assert found[at] == min(max(half_even(Fraction(float(total))), 88), 250)


def test_mul_broadcasts() -> None:
    a, b = integers(U, (3, 4)), integers(S, (4,), 1)
    step = QMul(name="m", inputs=("a", "b"), outputs=("y",), lower=3, upper=255)
    found = run(step, [tensor("a", a.shape, U), tensor("b", b.shape, S), tensor("y", a.shape, Y)], a, b)
    factor = F(F(F(U.scale) * F(S.scale)) / F(Y.scale))
    for at in positions(a.shape):
        value = (int(a[at]) - 117) * (int(b[at[1]]) + 9)
        assert found[at] == requantize(value, factor, 88, 3, 255)


def test_lookup_of_signed_integers() -> None:
    table = np.arange(255, -1, -1).astype(np.uint8)
    step = QLut(name="l", inputs=("x",), outputs=("y",), table=table, function="mirror")
    x = np.array([-128, -1, 0, 127], np.int8)
    assert run(step, [tensor("x", (4,), S), tensor("y", (4,), Y)], x).tolist() == [255, 128, 127, 0]


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("kind", ["max", "average"])
def test_pool(kind: str, include: bool) -> None:
    x = integers(U, (2, 3, 5, 6))
    dilations = (2, 1) if kind == "max" else (1, 1)
    step = QPool(
        name="p", inputs=("x",), outputs=("y",), kind=kind, kernel=(2, 3), strides=(2, 1), pads=(1, 1, 0, 1),
        dilations=dilations, count_include_pad=include,
    )  # fmt: skip
    size = ((5 + 1 - dilations[0] - 1) // 2 + 1, 6)
    quant = U if kind == "max" else Y
    found = run(step, [tensor("x", x.shape, U), tensor("y", (2, 3, *size), quant)], x)
    for n, c, i, j in positions(found.shape):
        taps = [(i * 2 - 1 + kh * dilations[0], j - 1 + kw) for kh in range(2) for kw in range(3)]
        inside = [int(x[n, c, a, b]) for a, b in taps if 0 <= a < 5 and 0 <= b < 6]
        if kind == "max":
            assert found[n, c, i, j] == max(inside)
        else:
            factor = F(F(F(U.scale) / F(Y.scale)) / F(6 if include else len(inside)))
            assert found[n, c, i, j] == requantize(sum(v - 117 for v in inside), factor, 88, 0, 255)


def move(kind: str, shape: tuple[int, ...], **fields: object) -> tuple[np.ndarray, np.ndarray]:
    x = integers(U, (2, 3, 4))
    step = Move(name="m", inputs=("x",), outputs=("y",), kind=kind, **fields)
    return x, run(step, [tensor("x", x.shape, U), tensor("y", shape, U)], x)


def test_moves() -> None:
    x, y = move("reshape", (4, 6))
    assert y.reshape(-1).tolist() == x.reshape(-1).tolist()
    x, y = move("transpose", (4, 2, 3), perm=(2, 0, 1))
    assert all(y[c, a, b] == x[a, b, c] for a, b, c in positions(x.shape))
    x, y = move("slice", (1, 2, 4), starts=(1, 0, 3), steps=(1, 2, -1))
    assert all(y[a, b, c] == x[1 + a, 2 * b, 3 - c] for a, b, c in positions(y.shape))
    indices = (np.array([1]), np.array([0, 0, 1, 2]), np.array([3, 0]))
    x, y = move("resize_nearest", (1, 4, 2), indices=indices)
    assert all(y[at] == x[tuple(i[a] for i, a in zip(indices, at, strict=True))] for at in positions(y.shape))
    x, y = move("pad", (3, 3, 6), pads=(1, 0, 0, 0, 0, 2), fill=117)
    assert (y[0] == 117).all()
    assert (y[1:, :, 4:] == 117).all()
    np.testing.assert_array_equal(y[1:, :, :4], x)
    x, y = move("expand", (5, 2, 3, 4))
    assert all((y[k] == x).all() for k in range(5))


def test_concat() -> None:
    a, b = integers(U, (2, 3), 1), integers(U, (2, 2), 2)
    step = QConcat(name="c", inputs=("a", "b"), outputs=("y",), axis=1)
    found = run(step, [tensor("a", (2, 3), U), tensor("b", (2, 2), U), tensor("y", (2, 5), U)], a, b)
    assert found.tolist() == [[*map(int, p), *map(int, q)] for p, q in zip(a, b, strict=True)]


def test_constants_and_kept_tensors() -> None:
    steps = (
        QAdd(name="a", inputs=("x", "k"), outputs=("s",)),
        Dequantize(name="d", inputs=("s",), outputs=("y",)),
    )
    tensors = {t.name: t for t in [tensor(n, (3,), U) for n in "xks"] + [tensor("y", (3,), None)]}
    program = Program(("x",), ("y",), steps, tensors, {"k": np.array([117, 118, 116], np.uint8)})
    found = run_program(program, {"x": np.array([5, 6, 7], np.uint8)}, keep=("s",))
    assert found["s"].tolist() == [5, 7, 6]
    np.testing.assert_array_equal(found["y"], dequantize(found["s"], U))


@pytest.mark.parametrize(
    "feeds",
    [{}, {"z": np.zeros(3, np.uint8)}, {"x": np.zeros(4, np.uint8)}, {"x": np.zeros(3, np.int8)}],
)
def test_wrong_feeds_are_refused(feeds: dict[str, np.ndarray]) -> None:
    step = Dequantize(name="d", inputs=("x",), outputs=("y",))
    program = Program(("x",), ("y",), (step,), {"x": tensor("x", (3,), U), "y": tensor("y", (3,), None)})
    with pytest.raises(DataError):
        run_program(program, feeds)
