"""WeightOnlyDot in the interpreter against loops over exact rationals that spell out its definition."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from bitwright.compiler.interpret.run import run_step
from bitwright.compiler.interpret.weight_only import round_activations
from bitwright.compiler.program.extract_weight_only import unpack
from bitwright.compiler.program.ops import Program, Tensor, WeightOnlyDot
from bitwright.passes.pack_nbits import pack

F = np.float32


def step_of(depth: int, columns: int, bits: int, group: int, *, bias: bool) -> WeightOnlyDot:
    rng = np.random.default_rng(depth)
    groups = -(-depth // group)
    return WeightOnlyDot(
        name="product",
        inputs=("x",),
        outputs=("y",),
        weight=rng.integers(0, 2**bits, (depth, columns)).astype(np.uint8),
        scale=rng.uniform(0.01, 0.1, (groups, columns)).astype(np.float32),
        zero_point=rng.integers(0, 2**bits, (groups, columns)).astype(np.uint8),
        bits=bits,
        group=group,
        bias=rng.normal(size=columns).astype(np.float32) if bias else None,
    )


def ran(step: WeightOnlyDot, x: np.ndarray) -> np.ndarray:
    shape = (*x.shape[:-1], step.weight.shape[1])
    tensors = {"x": Tensor("x", x.shape, "float32"), "y": Tensor("y", shape, "float32")}
    (y,) = run_step(step, Program(("x",), ("y",), (step,), tensors), (x,))
    assert (y.shape, y.dtype) == (shape, np.float32)
    return y


def rounded(x: np.ndarray) -> tuple[list[int], np.float32]:
    """Round one group of finite activations."""
    top = F(max(abs(float(v)) for v in x))
    if top < F(2.0**-100):
        return [0] * len(x), F(top / F(127))
    reciprocal = F(F(127) / top)
    return [round(Fraction(float(F(v * reciprocal)))) for v in x], F(top / F(127))


def spelled_out(step: WeightOnlyDot, row: np.ndarray, column: int) -> np.float32:
    total = F(0) if step.bias is None else step.bias[column]
    for g, start in enumerate(range(0, len(row), step.group)):
        q, scale = rounded(row[start : start + step.group])
        zero = int(step.zero_point[g, column])
        acc = sum(v * (int(step.weight[start + k, column]) - zero) for k, v in enumerate(q))
        factor = F(scale * step.scale[g, column])
        # Exact in rationals; rounding to float64 first matters only beside a tie, which this data has not.
        total = F(float(Fraction(float(F(acc))) * Fraction(float(factor)) + Fraction(float(total))))
    return total


@pytest.mark.parametrize(
    ("shape", "columns", "bits", "group"),
    [
        ((3, 64), 5, 4, 32),
        ((2, 2, 50), 4, 4, 20),
        ((1, 33), 3, 2, 16),
        ((2, 40), 3, 8, 32),
        ((1, 5), 2, 4, 32),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_its_definition(
    shape: tuple[int, ...], columns: int, bits: int, group: int, bias: bool
) -> None:
    step = step_of(shape[-1], columns, bits, group, bias=bias)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    y = ran(step, x).reshape(-1, columns)
    for r, row in enumerate(x.reshape(-1, shape[-1])):
        for n in range(columns):
            assert y[r, n] == spelled_out(step, row, n)


def test_activations_round_half_to_even_and_reach_127() -> None:
    x = np.array([[[127, -127, 0.5, 1.5, 2.5, -0.5, 0, -0.0]]], np.float32)
    q, scale = round_activations(x)
    assert q.tolist() == [[[127, -127, 0, 2, 2, 0, 0, 0]]]
    assert scale.tolist() == [[1.0]]


def test_no_magnitude_rounds_beyond_127() -> None:
    """The reciprocal is rounded, so the product of a group's largest number with it may pass 127, never 127.5."""
    tops = np.random.default_rng(0).uniform(1, 2, 20000).astype(np.float32)
    q, _ = round_activations(np.stack([tops, -tops], axis=-1)[None])
    assert (q == [127, -127]).all()


def test_what_is_not_finite_makes_its_rows_nan_and_no_other() -> None:
    step = step_of(64, 3, 4, 32, bias=True)
    x = np.random.default_rng(2).normal(size=(5, 64)).astype(np.float32)
    plain = ran(step, x)
    x[1, 7], x[2, 40], x[3, :2] = np.inf, np.nan, (-np.inf, np.nan)
    found = ran(step, x)
    assert np.isnan(found[1:4]).all()
    np.testing.assert_array_equal(found[[0, 4]], plain[[0, 4]])


@pytest.mark.parametrize("value", [0.0, -0.0, 2.0**-149, 2.0**-101])
def test_groups_of_nothing_leave_the_bias(value: float) -> None:
    step = step_of(64, 3, 4, 32, bias=True)
    x = np.full((1, 64), value, np.float32)
    np.testing.assert_array_equal(ran(step, x), step.bias[None])  # type: ignore[index]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacking_is_the_inverse_of_packing(bits: int) -> None:
    values = np.random.default_rng(3).integers(0, 2**bits, (5, 16)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(values, bits), bits), values)
