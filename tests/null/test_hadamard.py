"""Matrices that spread: orthogonal, of one magnitude where a Hadamard matrix is known, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from bitwright.compiler.rounding.hadamard import hadamard, spreading_matrix

# Powers of two, Paley's first and second construction, doubled ones, and the widths of real decoders.
KNOWN = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 60, 64, 192, 576, 896, 960, 1536]


@pytest.mark.parametrize("order", KNOWN)
def test_rows_of_ones_are_orthogonal(order: int) -> None:
    found = hadamard(order)
    assert found is not None
    assert set(np.unique(found)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(found @ found.T, order * np.eye(order))


def test_every_multiple_of_four_up_to_forty_eight_is_known() -> None:
    assert all(hadamard(order) is not None for order in range(4, 49, 4))


@pytest.mark.parametrize("order", [3, 6, 7, 10, 92])
def test_other_orders_get_a_random_orthogonal_matrix(order: int) -> None:
    assert hadamard(order) is None
    found = spreading_matrix(order, 5)
    np.testing.assert_allclose(found @ found.T, np.eye(order), atol=1e-12)
    np.testing.assert_array_equal(found, spreading_matrix(order, 5))


def test_one_large_element_is_spread_evenly() -> None:
    found = spreading_matrix(192, 0)
    np.testing.assert_allclose(np.abs(found[17]), 192**-0.5)
    assert not np.array_equal(found, spreading_matrix(192, 1))
