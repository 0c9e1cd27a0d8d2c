"""Tiles of GPU kernels, and what is read of ptxas."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.lower.templates.geometry import DotGeometry
from bitwright.targets.nvidia_gpu.mma_tiles import (
    DP4A_UNIT,
    MMA_UNIT,
    Extent,
    Tiling,
    gather_width,
    raster,
    space,
)
from bitwright.targets.nvidia_gpu.ptxas import Resources, read_resources, require_fitting, violations
from bitwright.targets.sections.gpu import Gpu

GPU = Gpu(
    architecture="sm_80",
    multiprocessors=108,
    shared_bytes_per_block=166912,
    shared_bytes_per_multiprocessor=167936,
)
SPOKEN = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemm_kernel' for 'sm_80'
ptxas info    : Function properties for gemm_kernel
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 164 registers, used 1 barriers, 16 bytes cumulative stack size, 392 bytes cmem[0]
ptxas info    : Compile time = 45.000 ms
ptxas info    : Compiling entry function 'other' for 'sm_80'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 2048 bytes smem, 392 bytes cmem[0]
"""


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 2000), st.integers(1, 5000), st.integers(1, 3), st.integers(0, 1))
def test_every_shape_has_a_tile_and_all_tiles_are_legal(
    rows: int, columns: int, depth: int, groups: int, output: int
) -> None:
    for unit in (MMA_UNIT, DP4A_UNIT):
        found = list(space(Extent(rows, columns, depth, groups), GPU, output, unit))
        assert found
        assert all(t.is_legal(unit, GPU, output) for t in found)
        assert len(set(found)) == len(found)


def test_a_tile_that_does_not_fit_is_illegal() -> None:
    good = Tiling(128, 128, 64, 64, 64, 3)
    assert good.is_legal(MMA_UNIT, GPU, 1)
    small = GPU.model_copy(update={"shared_bytes_per_block": 3 * 256 * 64 - 1})
    assert not good.is_legal(MMA_UNIT, small, 1)
    assert not good.is_legal(MMA_UNIT, GPU.model_copy(update={"registers_per_thread": 128}), 1)
    assert not good.is_legal(MMA_UNIT, GPU.model_copy(update={"threads_per_block": 64}), 1)


@pytest.mark.parametrize(
    ("channels", "group", "width"),
    [(64, 1, 16), (24, 1, 8), (12, 1, 4), (3, 1, 1), (6, 1, 1), (48, 2, 8), (64, 64, 1)],
)
def test_copies_are_as_wide_as_neighbouring_channels_allow(channels: int, group: int, width: int) -> None:
    g = DotGeometry((1, 8, 8, channels), (1, 8, 8, 64), 1, 8, 8, channels, 8, 8, 64, (3, 3), group=group)
    assert gather_width(g) == width


def test_row_tiles_that_go_together_divide_them_all() -> None:
    assert [raster(n) for n in (1, 7, 8, 12, 13, 32)] == [1, 7, 8, 6, 1, 8]


def test_what_ptxas_says_is_read() -> None:
    assert read_resources(SPOKEN) == (
        Resources("gemm_kernel", 164, 20, 16, 0),
        Resources("other", 32, 0, 0, 2048),
    )
    assert read_resources("ptxas info    : 0 bytes gmem\n") == ()


def test_a_kernel_without_figures_is_an_error() -> None:
    with pytest.raises(ToolchainError, match="did not say"):
        read_resources("Compiling entry function 'k' for 'sm_80'\n")


@pytest.mark.parametrize(
    ("resources", "threads", "shared", "what"),
    [
        (Resources("k", 256, 0, 0, 0), 128, 0, "256 registers, 255 possible"),
        (Resources("k", 136, 0, 0, 0), 512, 0, "136 registers, 128 possible"),
        (Resources("k", 32, 0, 0, 1024), 128, 166000, "167024 bytes of shared memory"),
        (Resources("k", 32, 0, 0, 0), 2048, 0, "2048 threads"),
        (Resources("k", 32, 8, 0, 0), 128, 0, "8 bytes of spilled registers"),
    ],
)
def test_what_does_not_fit_is_named(resources: Resources, threads: int, shared: int, what: str) -> None:
    assert any(what in said for said in violations(resources, GPU, threads, shared))
    with pytest.raises(ToolchainError, match=what):
        require_fitting((resources,), GPU, {"k": (threads, shared)})


def test_what_fits_is_accepted_and_what_was_not_compiled_is_not() -> None:
    fine = Resources("k", 128, 0, 0, 0)
    require_fitting((fine,), GPU, {"k": (512, 4096)})
    require_fitting((Resources("k", 32, 8, 8, 0),), GPU, {"k": (128, 0)}, spills=True)
    with pytest.raises(ToolchainError, match="no kernel 'missing'"):
        require_fitting((fine,), GPU, {"missing": (128, 0)})
