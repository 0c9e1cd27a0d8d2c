"""Kernels of grouped weights for Arm under qemu: equal to the interpreter bit for bit, with and without sdot."""

from pathlib import Path

import numpy as np
import pytest
import tvm
from weight_only_reference import CASES, Case, make, random_case

from bitwright.compiler.interpret.weight_only import weight_only_dot
from bitwright.targets.arm_cpu import emulated
from bitwright.targets.arm_cpu.kernel_calls import KernelArguments, call_kernels
from bitwright.targets.arm_cpu.kernels import dot_kernel
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Profile

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

INTRINSIC = {"arm-cortex-a72": "neon_smlal", "arm-cortex-a76": "neon_sdot"}
RANDOM = {"arm-cortex-a72": range(200, 212), "arm-cortex-a76": range(300, 312)}


def library(cases: tuple[Case, ...], profile: Profile, folder: Path) -> tuple[Path, list[KernelArguments]]:
    """Compile one function for each case into one library."""
    backend = backend_for("arm_cpu")
    functions, calls = {}, []
    for case in cases:
        step, program, x = make(case)
        kernel = dot_kernel(step, program, profile)
        assert kernel.intrinsic == INTRINSIC[profile.name]
        functions[case.label] = kernel.function.with_attr("global_symbol", case.label)
        y = np.full(kernel.output_shape, 77, np.float32)
        calls.append(KernelArguments(case.label, (x, *kernel.constants, y)))
    target = tvm.target.Target(backend.tvm_target(profile))
    executable = tvm.compile(tvm.IRModule(functions), target=target)
    path = folder / "kernels.so"
    executable.export_library(
        str(path),
        fcompile=lambda output, files, **_: backend.link([Path(f) for f in files], Path(output), profile),
    )
    return path, calls


@pytest.mark.parametrize("target", list(INTRINSIC))
def test_kernels_equal_the_interpreter(target: str, tmp_path: Path) -> None:
    profile, examined = load_profile(target), (*CASES, *map(random_case, RANDOM[target]))
    reason = backend_for("arm_cpu").why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    path, calls = library(examined, profile, tmp_path)
    found = call_kernels(path, calls, profile, emulated.launch(profile))
    for case, got in zip(examined, found, strict=True):
        step, _, x = make(case)
        want = weight_only_dot(step, x)
        same = (got.view(np.int32) == want.view(np.int32)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), f"{case}: {np.count_nonzero(~same)} of {same.size} differ"
