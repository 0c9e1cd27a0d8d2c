"""Every dot-product kernel of x86 equals the integer program's formulas bit for bit."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tvm
from dot_reference import CASES, Case, channels_last, expected, make, random_case

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.targets.x86_cpu.kernels import choose_intrinsic, kernel_for

CPU_FLAG = {"amx_int8": "amx_int8", "avx512_vnni": "avx512_vnni", "avx2_pmaddwd": "avx2"}
MCPU = {"amx_int8": "sapphirerapids", "avx512_vnni": "cascadelake", "avx2_pmaddwd": "haswell"}
ARCH_REQ_XCOMP_PERM, TILE_DATA = 0x1023, 18


@cache
def cpu_flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))


@pytest.fixture(params=sorted(CPU_FLAG))
def intrinsic(request) -> str:
    if platform.machine() != "x86_64" or CPU_FLAG[request.param] not in cpu_flags():
        pytest.skip(f"this CPU has no {request.param}")
    if request.param == "amx_int8" and ctypes.CDLL(None).syscall(158, ARCH_REQ_XCOMP_PERM, TILE_DATA):
        pytest.skip("the kernel refuses AMX tile data")
    return request.param


def run_kernel(case: Case, intrinsic: str) -> tuple[np.ndarray, np.ndarray]:
    step, program, x = make(case)
    kernel = kernel_for(step, program, (intrinsic,))
    module = tvm.IRModule({"main": kernel.function.with_attr("global_symbol", "main")})
    target = tvm.target.Target({"kind": "llvm", "mcpu": MCPU[intrinsic]})
    function = tvm.compile(module, target=target)["main"]
    # Written before and compared after, so that an element the kernel forgets cannot be right by chance.
    y = tvm.runtime.tensor(np.full(kernel.output_shape, 77, kernel.output_dtype))
    arrays = [tvm.runtime.tensor(a) for a in (channels_last(x, case), *kernel.constants)]
    function(*arrays, y)
    return y.numpy(), channels_last(expected(step, program, x), case)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_kernel_equals_the_formulas(case, intrinsic):
    got, want = run_kernel(case, intrinsic)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("number", range(12))
def test_random_shapes(number, intrinsic):
    case = random_case(np.random.default_rng(1000 + number), number)
    got, want = run_kernel(case, intrinsic)
    np.testing.assert_array_equal(got, want, err_msg=case.label)
