"""The ARM kernels compile to the instruction they are named after; emulated tests check their results."""

from __future__ import annotations

import re

import pytest
import tvm
from dot_reference import CASES, make

from bitwright.compiler.errors import ProfileError
from bitwright.targets.arm_cpu.kernels import dot_kernel, kernel_for, usable
from bitwright.targets.loader import load_profile

SELECTED = ("gemm", "gemm_narrow", "gemm_float", "conv3x3", "conv_10x4", "conv_groups")
MCPU = {"neon_sdot": "cortex-a76", "neon_smlal": "cortex-a72"}


def assembly(case, intrinsic: str) -> str:
    step, program, _ = make(case)
    function = kernel_for(step, program, (intrinsic,)).function.with_attr("global_symbol", "main")
    target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": MCPU[intrinsic]})
    return tvm.compile(tvm.IRModule({"main": function}), target=target).mod.inspect_source("asm")


def instructions(text: str, pattern: str) -> int:
    return len(re.findall(rf"^\s+(?:{pattern})\s", text, re.MULTILINE))


@pytest.mark.parametrize("case", [c for c in CASES if c.label in SELECTED], ids=lambda c: c.label)
def test_sdot_is_emitted(case):
    text = assembly(case, "neon_sdot")
    assert instructions(text, "sdot") > 0
    assert instructions(text, "smlal2?|umlal2?") == 0


@pytest.mark.parametrize("case", [c for c in CASES if c.label in SELECTED], ids=lambda c: c.label)
def test_smlal_needs_no_dot_product_extension(case):
    text = assembly(case, "neon_smlal")
    assert instructions(text, "smlal2?|smull2?") > 0
    assert instructions(text, "[su]dot|smmla") == 0


def test_float_output_is_fused():
    text = assembly(next(c for c in CASES if c.label == "gemm_float"), "neon_sdot")
    assert instructions(text, "fmla|fmadd") > 0


def test_unknown_rows_are_refused():
    with pytest.raises(ProfileError, match="neon_smlal"):
        usable(("sve_dot",))


@pytest.mark.parametrize(
    ("profile", "chosen"),
    [
        ("arm-cortex-a53", "neon_smlal"),
        ("arm-cortex-a72", "neon_smlal"),
        ("arm-cortex-a76", "neon_sdot"),
        ("arm-neoverse-n2", "neon_smmla"),
    ],
)
def test_shipped_profiles_name_the_instruction(profile, chosen):
    step, program, _ = make(next(c for c in CASES if c.label == "conv3x3"))
    assert dot_kernel(step, program, load_profile(profile)).intrinsic == chosen
