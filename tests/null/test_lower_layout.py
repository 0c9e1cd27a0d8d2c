"""Storage orders and the kernel table: plain data, no compiler."""

import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest

from bitwright.compiler.errors import InternalError
from bitwright.compiler.lower.kernel_table import KernelCall, Stored, dump_table, load_table, to_logical
from bitwright.compiler.lower.layout import (
    CHANNELS_LAST,
    before_transpose,
    physical_shape,
    row_major,
    same_storage,
    transposed,
)


def stored(shape, order, buffer_shape=None):
    return Stored("t", shape, order, "uint8", 0, buffer_shape or physical_shape(shape, order))


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("perm", list(permutations(range(3))))
def test_a_transpose_keeps_the_bytes_in_place(order, perm):
    x = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    bytes_of_x = x.transpose(order).copy(order="C")
    y = x.transpose(perm)
    after = transposed(order, perm)
    np.testing.assert_array_equal(to_logical(bytes_of_x, stored(y.shape, after)), y)
    assert before_transpose(after, perm) == order


def test_axes_of_one_element_do_not_count():
    assert same_storage((2, 8, 1, 1), CHANNELS_LAST, row_major(4))
    assert same_storage((2, 1, 5, 6), CHANNELS_LAST, row_major(4))
    assert not same_storage((1, 8, 1, 2), CHANNELS_LAST, row_major(4))


def test_to_logical_reads_flattened_buffers():
    x = np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4)
    flat = x.transpose(CHANNELS_LAST).reshape(12, 2)
    np.testing.assert_array_equal(to_logical(flat, stored(x.shape, CHANNELS_LAST, (12, 2))), x)
    with pytest.raises(InternalError, match="expected uint8"):
        to_logical(flat[:6], stored(x.shape, CHANNELS_LAST))


def test_the_table_survives_json():
    call = KernelCall(
        "conv", "QConv", "bw_000_conv", 0, "llvm", (stored((1, 2), (1, 0)),), stored((3,), (0,))
    )
    layout = KernelCall(None, "Layout", "bw_001_layout", 1, "llvm", (stored((), ()),), stored((), ()))
    assert load_table(dump_table((call, layout))) == (call, layout)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 99, "calls": []}', '{"version": 1, "calls": [{}]}']
)
def test_a_damaged_table_is_refused(text):
    with pytest.raises(InternalError):
        load_table(text)


def test_parents_of_the_worker_do_not_import_tvm():
    code = "import sys, bitwright.compiler.lower.job; sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
