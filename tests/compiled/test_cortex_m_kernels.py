"""Kernels of Cortex-M compile to the instructions they are named after, and to objects that need no runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from dot_reference import Case, make
from tvm import tirx

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.static_c.kernels import RawKernels, raw_kernels, write_object
from bitwright.targets.backend import KernelChoice
from bitwright.targets.cortex_m.backend import BACKEND
from bitwright.targets.cortex_m.epilogue import ROUNDING_BITS, ROUNDING_FLOAT
from bitwright.targets.cortex_m.instruction import VMULL, VMULL_WIDE, PatchInstruction
from bitwright.targets.loader import load_profile

CONV = Case("conv", (1, 8, 6, 6), (8, 8, 3, 3), pads=(1, 1, 1, 1), x_dtype="int8", y_dtype="int8")
DENSE = Case("dense", (4, 64), (64, 8), x_dtype="int8", y_dtype="float32")
DEPTHWISE = Case("depthwise", (1, 8, 6, 6), (8, 1, 3, 3), group=8, x_dtype="int8", y_dtype="int8")


def lowered(case: Case, target: str) -> tuple[RawKernels, dict[str, Any]]:
    step, program, _ = make(case)
    profile = load_profile(target)
    kernel = BACKEND.dot_kernel(step, program, profile)
    machine = BACKEND.tvm_target(profile)
    return raw_kernels(tvm.IRModule({tvm.ir.GlobalVar("kernel"): kernel.function}), machine), machine


def assembly(case: Case, target: str) -> str:
    kernels, machine = lowered(case, target)
    found = tvm.target.Target(machine)
    module = tirx.transform.LowerIntrin()(tirx.transform.BindTarget(found.with_host(found))(kernels.module))
    text: str = tvm_ffi.get_global_func("target.build.llvm")(module, found).inspect_source("s")
    return text


@pytest.mark.parametrize(
    ("case", "target", "instructions"),
    [
        (CONV, "cortex-m4", ("smlad", "sxtb16", "vcvtr.s32.f32")),
        (DENSE, "cortex-m7", ("smlad", "sxtb16", "vfma.f32")),
        (DEPTHWISE, "cortex-m4", ("smlabb", "smlatt")),
        (CONV, "cortex-m55", ("vmlava.s8", "vcvtn.s32.f32")),
        (DENSE, "cortex-m55", ("vmlava.s8", "vfma.f32")),
        (DEPTHWISE, "cortex-m55", ("vmul.i32", "vcvtn.s32.f32")),
        (CONV, "arm-cortex-a7", ("vmull.s8", "vpadal.s16", "vpadd.i32", "vcvt.f32.s32")),
        (DENSE, "arm-cortex-a7", ("vmull.s8", "vpadal.s16", "vfma.f32")),
        (DEPTHWISE, "arm-cortex-a7", ("vmovl.s8", "vmlal.s16")),
    ],
)
def test_the_promised_instructions_are_there(case: Case, target: str, instructions: tuple[str, ...]) -> None:
    text = assembly(case, target)
    assert [i for i in instructions if i not in text] == []


@pytest.mark.parametrize("target", ["cortex-m4", "cortex-m55", "arm-cortex-a7"])
def test_objects_need_no_runtime(target: str, tmp_path: Path) -> None:
    kernels, machine = lowered(CONV, target)
    path = tmp_path / "kernel.o"
    needs = write_object(kernels, {"kernel"}, machine, path)
    assert 0 < needs["kernel"] < 1024
    data = path.read_bytes()
    assert data[:5] == b"\x7fELF\x01" and b"kernel" in data
    assert b"TVMBackend" not in data and b"TVMFFI" not in data


@pytest.mark.parametrize(("smallest", "variant"), [(-127, VMULL), (-128, VMULL_WIDE)])
def test_two_products_are_added_in_16_bits_only_where_they_fit(
    smallest: int, variant: PatchInstruction
) -> None:
    """2 * 128 * 127 < 2^15, but 2 * 128 * 128 is not: another instruction with another key."""
    step, program, _ = make(CONV)
    narrow = replace(step, weight=np.maximum(step.weight, -127))
    narrow.weight.flat[5] = smallest
    assert VMULL.for_weights(narrow.weight) == variant
    text = BACKEND.dot_kernel(narrow, program, load_profile("arm-cortex-a7"))
    assert f"'{variant.variant}')" in text.key


def test_rounding_by_addition_is_rounding_half_to_even() -> None:
    """Every half, its neighbours, and numbers far away: clamping first and adding 1.5 * 2^23 changes nothing."""
    halves = np.arange(-600, 600, dtype=np.float32) / 2
    far = np.float32([2**22 + 1, 2**23, 1e9, 3e38, np.inf, 1e-30, 1e-44])
    reals = np.concatenate(
        [halves, np.nextafter(halves, np.float32(1e9)), np.nextafter(halves, np.float32(-1e9)), far, -far]
    )
    for low, high in ((-128, 127), (-255, 0), (0, 255)):
        limited = np.clip(reals, np.float32(low), np.float32(high))
        steps = (limited + np.float32(ROUNDING_FLOAT)).view(np.int32) - np.int32(ROUNDING_BITS)
        assert np.array_equal(steps, np.clip(np.rint(reals), low, high).astype(np.int32))


def test_scratch_is_an_argument_and_small(tmp_path: Path) -> None:
    """The patches of at most four pixels, where a padded copy of the image would be 12 * 12 * 32 bytes."""
    case = Case("wide", (1, 32, 10, 10), (8, 32, 3, 3), pads=(1, 1, 1, 1), x_dtype="int8", y_dtype="int8")
    kernels, _ = lowered(case, "cortex-m4")
    (patches,) = kernels.scratch["kernel"]
    assert 32 * 3 * 3 <= patches <= 4 * 32 * 3 * 3
    assert 0 < kernels.locals["kernel"] <= 128, "the accumulators"


def test_what_the_kernels_cannot_do_is_refused() -> None:
    step, program, _ = make(Case("u8", (4, 64), (64, 8), x_dtype="uint8"))
    profile = load_profile("cortex-m4")
    with pytest.raises(ProfileError, match="multiply int8 activations, not uint8"):
        BACKEND.dot_kernel(step, program, profile)
    step, program, _ = make(DENSE)
    with pytest.raises(ProfileError, match="no way to compute this step"):
        BACKEND.dot_kernel(
            step, program, profile, KernelChoice("patch_gemm", "dsp_smlad", (("channels", 3), ("pixels", 9)))
        )
