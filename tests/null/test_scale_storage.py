"""Scales in fewer bits: close to what they were, exactly what the file gives back, and counted as what they take."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.compiler.plan.model import Plan, WeightQuant
from bitwright.compiler.plan.scale_storage import (
    as_bfloat16,
    groups_together,
    narrowed,
    scale_bits,
    super_scales,
)
from bitwright.compiler.plan.weights import stored_bytes


def scales(*shape: int) -> np.ndarray:
    return np.exp(np.random.default_rng(0).standard_normal(shape)).astype(np.float32) * np.float32(0.01)


@pytest.mark.parametrize("groups", [1, 2, 6, 7, 8, 11, 16, 24])
def test_products_of_integers_and_units_are_found_again(groups: int) -> None:
    parts = super_scales(scales(5, groups))
    found = parts.scales()
    again = super_scales(found)
    np.testing.assert_array_equal(again.integers, parts.integers)
    np.testing.assert_array_equal(again.units, parts.units)
    np.testing.assert_array_equal(as_bfloat16(parts.units), parts.units)
    # The unit has 8 significant bits (an error of 1/256 at most), the integer is off by half a unit.
    assert (np.abs(found - scales(5, groups)) <= found / 256 + 0.51 * np.repeat(
        parts.units[..., 0], groups // parts.units.shape[1], axis=-1)).all()  # fmt: skip


def test_a_group_of_zeros_keeps_a_positive_scale() -> None:
    mixed = scales(1, 8)
    mixed[0, 3] = np.float32(2.0**-100)
    assert (super_scales(mixed).scales() > 0).all()


@pytest.mark.parametrize(("count", "together"), [(1, 1), (6, 6), (16, 8), (18, 6), (13, 1)])
def test_as_many_groups_as_divide_share_a_unit(count: int, together: int) -> None:
    assert groups_together(count) == together


@pytest.mark.parametrize(
    ("storage", "dtype", "bits", "expected"),
    [
        ("float32", "uint4", 4, 4 + 1 + 4 / 32),
        ("bfloat16", "uint4", 4, 4 + 0.5 + 4 / 32),
        ("integer", "uint4", 4, 4 + 0.25 + 16 / 256 + 4 / 32),  # a byte a group, two for eight of them
        ("integer", "uint4", 3, 3 + 0.25 + 16 / 256 + 4 / 32),  # codes in planes, zero points as they are
    ],
)
def test_bytes_are_those_of_the_file(storage: str, dtype: str, bits: int, expected: float) -> None:
    shape = (16, 64)
    zero = np.zeros(shape, np.uint8)
    quant = WeightQuant("w", dtype, 0, scales(*shape), zero, 32, bits)
    kept = narrowed(Plan("t", "onnxruntime", weights={"w": quant}), storage).weights["w"]  # type: ignore[arg-type]
    assert stored_bytes(kept, 512 * 64) == 512 * 64 * expected / 8
    assert scale_bits(storage, 16) * 64 * 16 / (512 * 64) == pytest.approx(expected - bits - 4 / 32)  # type: ignore[arg-type]


def test_scales_without_groups_stay() -> None:
    quant = WeightQuant("w", "int8", 1, scales(64))
    kept = narrowed(Plan("t", "onnxruntime", weights={"w": quant}), "integer").weights["w"]
    np.testing.assert_array_equal(kept.scale, quant.scale)
    assert kept.scale_storage == "float32"
