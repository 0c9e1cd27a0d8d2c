"""Products with grouped weights for tests: random steps, and inputs that are hard to round."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bitwright.compiler.program.ops import Program, Tensor, WeightOnlyDot


@dataclass(frozen=True)
class Case:
    """A random step: activations [..., K], weight [K, N] in groups, one zero point for all or one a group."""

    label: str
    rows: tuple[int, ...]
    depth: int
    columns: int
    bits: int = 4
    group: int = 32
    one_zero: bool = True
    bias: bool = False
    extreme: bool = False
    hard: bool = False
    seed: int = 0


def make(case: Case) -> tuple[WeightOnlyDot, Program, np.ndarray]:
    """Return the step, a program that holds it, and an input."""
    rng = np.random.default_rng(case.seed)
    largest, groups = 2**case.bits - 1, -(-case.depth // case.group)
    weight = rng.integers(0, largest + 1, (case.depth, case.columns))
    zeros = rng.integers(0, largest + 1, (groups, case.columns))
    x = rng.normal(size=(*case.rows, case.depth)).astype(np.float32)
    if (
        case.extreme
    ):  # the largest sums: all activations at their largest, all codes far from their zero point
        weight[:], zeros[:], x[...] = largest, 0, -1.0
    if case.one_zero and not case.extreme:
        zeros[:] = largest // 2 + 1
    if case.hard:
        make_hard(x)
    step = WeightOnlyDot(
        name=case.label,
        inputs=("x",),
        outputs=("y",),
        weight=weight.astype(np.uint8),
        scale=rng.uniform(0.001, 0.02, (groups, case.columns)).astype(np.float32),
        zero_point=zeros.astype(np.uint8),
        bits=case.bits,
        group=case.group,
        bias=rng.normal(size=case.columns).astype(np.float32) if case.bias else None,
    )
    tensors = {
        "x": Tensor("x", x.shape, "float32"),
        "y": Tensor("y", (*case.rows, case.columns), "float32"),
    }
    return step, Program(("x",), ("y",), (step,), tensors), x


def make_hard(x: np.ndarray) -> None:
    """Put zeros, ties, infinities, NaN and tiny numbers into the rows of an input with at least 8 rows."""
    rows = x.reshape(-1, x.shape[-1])
    rows[0] = 0.0
    rows[1] = -0.0
    rows[2, 3] = np.inf
    rows[3, -1] = np.nan
    rows[4] *= np.float32(2.0**-140)  # subnormal
    rows[5] *= np.float32(1e30)
    rows[6] = np.tile(np.array([127, 0.5, -1.5, 2.5], np.float32), -(-rows.shape[1] // 4))[
        : rows.shape[1]
    ]  # ties
    rows[7, :2] = np.inf, np.nan


def random_case(number: int) -> Case:
    """Return a random case of any kind."""
    rng = np.random.default_rng(4000 + number)
    return Case(
        f"random{number}",
        rows=tuple(int(d) for d in rng.integers(1, 6, int(rng.integers(1, 3)))),
        depth=int(rng.integers(1, 200)),
        columns=int(rng.integers(1, 150)),
        bits=int(rng.choice([2, 4, 8])),
        group=int(rng.choice([16, 20, 32, 64, 128, 256])),
        one_zero=bool(rng.integers(2)),
        bias=bool(rng.integers(2)),
        seed=number,
    )


CASES = (
    Case("gemv", (1,), 256, 192),
    Case("gemv_narrow", (1,), 64, 5, bias=True),
    Case("short_group", (1,), 100, 64, one_zero=False),
    Case("odd_group", (3,), 130, 37, group=20, bias=True),
    Case("one_group", (2,), 24, 16, group=32),
    Case("long_group", (2, 3), 600, 33, group=256, one_zero=False),
    Case("two_bits", (1,), 192, 48, bits=2, bias=True),
    Case("two_bits_zeros", (4,), 70, 47, bits=2, one_zero=False),
    Case("eight_bits", (1,), 96, 70, bits=8),
    Case("eight_bits_zeros", (5,), 70, 33, bits=8, group=16, one_zero=False, bias=True),
    Case("rows_tail", (11,), 64, 130),
    Case("prompt", (40,), 96, 64, bias=True),
    Case("parallel", (4,), 512, 600),
    Case("hard", (9,), 75, 50, hard=True, bias=True),
    Case("extreme4", (2,), 512, 40, group=256, extreme=True),
    Case("extreme8", (2,), 512, 40, bits=8, group=256, extreme=True),
    Case("extreme2", (2,), 512, 40, bits=2, group=256, extreme=True),
)


def constant_variant(case: Case) -> Case:
    """Return a case of the same form with other constants."""
    return replace(case, seed=case.seed + 1)
