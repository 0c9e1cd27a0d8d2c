"""Hundreds of random steps, each computed by a random member of its space: all equal the formulas bit for bit."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest
import tvm
from dot_reference import Case, channels_last, expected, make, random_case, random_depthwise
from test_dot_kernels_x86 import ARCH_REQ_XCOMP_PERM, CPU_FLAG, MCPU, TILE_DATA, cpu_flags

from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.x86_cpu.kernels import candidates_for, kernel_for

STEPS, MODULES = 14, 6  # for each of the three instructions: 252 in all


def usable(intrinsic: str) -> bool:
    if platform.machine() != "x86_64" or CPU_FLAG[intrinsic] not in cpu_flags():
        return False
    return intrinsic != "amx_int8" or not ctypes.CDLL(None).syscall(158, ARCH_REQ_XCOMP_PERM, TILE_DATA)


def case_of(number: int, intrinsic: str) -> Case:
    """Return a random step, another one for every instruction."""
    rng = np.random.default_rng([sorted(CPU_FLAG).index(intrinsic), number])
    kind = random_depthwise if intrinsic != "amx_int8" and number % 4 == 0 else random_case
    return kind(rng, number)


def drawn(rng: np.random.Generator, number: int, intrinsic: str) -> tuple[Case, KernelChoice, Kernel]:
    """Return a step and one of the ways to compute it, the default every second time."""
    case = case_of(number, intrinsic)
    step, program, _ = make(case)
    known = candidates_for(step, program, (intrinsic,))
    choice = known[int(rng.integers(len(known)))] if number % 2 else known[0]
    return case, choice, kernel_for(step, program, (intrinsic,), choice)


@pytest.mark.parametrize("part", range(MODULES))
@pytest.mark.parametrize("intrinsic", sorted(CPU_FLAG))
def test_random_steps_and_members(intrinsic, part):
    if not usable(intrinsic):
        pytest.skip(f"this machine has no {intrinsic}")
    rng = np.random.default_rng([part, sorted(CPU_FLAG).index(intrinsic)])
    target = tvm.target.Target({"kind": "llvm", "mcpu": MCPU[intrinsic]})
    for number in range(part * STEPS, (part + 1) * STEPS):
        case, choice, kernel = drawn(rng, number, intrinsic)
        function = kernel.function.with_attr("global_symbol", "main")
        module = tvm.compile(tvm.IRModule({"main": function}), target=target)
        step, program, x = make(case)
        # Written before and compared after, so that an element the kernel forgets cannot be right by chance.
        y = tvm.runtime.tensor(np.full(kernel.output_shape, 77, kernel.output_dtype))
        arrays = [tvm.runtime.tensor(a) for a in (channels_last(x, case), *kernel.constants)]
        module["main"](*arrays, y)
        want = channels_last(expected(step, program, x), case)
        np.testing.assert_array_equal(y.numpy(), want, err_msg=f"{case} by {choice.label()}")


def test_saturating_16_bit_sums_never_occur():
    """255 * 127 * 2 does not fit 16 bits: the pairwise byte product would be wrong, the widened one is exact."""
    if not usable("avx2_pmaddwd"):
        pytest.skip("this machine has no avx2")
    for weight in (127, -128):
        case = Case("extreme", (5, 96), (96, 40), y_dtype="float32", bias=False)
        step, program, _ = make(case)
        step.weight[:] = weight
        x = np.full(case.x, 255, np.uint8)
        kernel = kernel_for(step, program, ("avx2_pmaddwd",))
        module = tvm.compile(
            tvm.IRModule({"main": kernel.function.with_attr("global_symbol", "main")}),
            target=tvm.target.Target({"kind": "llvm", "mcpu": MCPU["avx2_pmaddwd"]}),
        )
        y = tvm.runtime.tensor(np.zeros(kernel.output_shape, "float32"))
        module["main"](*[tvm.runtime.tensor(a) for a in (x, *kernel.constants)], y)
        np.testing.assert_array_equal(y.numpy(), expected(step, program, x))
