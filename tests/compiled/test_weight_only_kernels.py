"""Kernels of grouped weights on x86 equal the interpreter bit for bit, whatever their blocking."""

from __future__ import annotations

import os

os.environ.setdefault("TVM_NUM_THREADS", "1")

import platform
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from weight_only_reference import CASES, Case, constant_variant, make, random_case

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.interpret.weight_only import weight_only_dot
from bitwright.compiler.lower.templates.weight_only import weight_only_kernel
from bitwright.compiler.lower.templates.weight_only_geometry import (
    WeightOnlyParams,
    space,
    weight_only_geometry,
)
from bitwright.targets.backend import Kernel, backend_for
from bitwright.targets.loader import load_profile
from bitwright.targets.x86_cpu.codes import CODE_AVX2, CODE_VNNI
from bitwright.targets.x86_cpu.kernels import candidates, dot_kernel

INSTRUCTIONS = {i.name: i for i in (CODE_VNNI, CODE_AVX2)}
MCPU = {"avx512_vnni": "cascadelake", "avx2_pmaddwd": "haswell"}
FLAG = {"avx512_vnni": "avx512_vnni", "avx2_pmaddwd": "avx2"}
RANDOM = {"avx512_vnni": range(30), "avx2_pmaddwd": range(100, 130)}


@pytest.fixture(params=list(INSTRUCTIONS))
def intrinsic(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    flags = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else []
    if FLAG[name] not in flags:
        pytest.skip(f"this processor has no {FLAG[name]}")
    return name


def compiled(kernel: Kernel) -> tvm.runtime.Executable:
    module = tvm.IRModule({"main": kernel.function.with_attr("global_symbol", "main")})
    target = tvm.target.Target({"kind": "llvm", "mcpu": MCPU[kernel.intrinsic]})
    return tvm.compile(module, target=target)


def execute(kernel: Kernel, x: np.ndarray) -> np.ndarray:
    # Written before and compared after, so that an element the kernel forgets cannot be right by chance.
    y = tvm.runtime.tensor(np.full(kernel.output_shape, 77, np.float32))
    compiled(kernel)["main"](*(tvm.runtime.tensor(a) for a in (x, *kernel.constants)), y)
    return y.numpy()


def check(got: np.ndarray, want: np.ndarray, what: str = "") -> None:
    """Compare bits; every NaN equals every other."""
    same = (got.view(np.int32) == want.view(np.int32)) | (np.isnan(got) & np.isnan(want))
    assert same.all(), f"{what}: {np.count_nonzero(~same)} of {same.size} differ"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.label)
def test_kernel_equals_the_interpreter(case: Case, intrinsic: str) -> None:
    step, program, x = make(case)
    check(execute(weight_only_kernel(step, program, INSTRUCTIONS[intrinsic]), x), weight_only_dot(step, x))


@pytest.mark.parametrize("part", range(3))
def test_random_shapes(part: int, intrinsic: str) -> None:
    for number in list(RANDOM[intrinsic])[part::3]:
        case = random_case(number)
        step, program, x = make(case)
        got = execute(weight_only_kernel(step, program, INSTRUCTIONS[intrinsic]), x)
        check(got, weight_only_dot(step, x), str(case))


@pytest.mark.parametrize("label", ["rows_tail", "two_bits_zeros"])
def test_blocking_does_not_change_the_result(label: str, intrinsic: str) -> None:
    """A spread of the legal space: best and worst by estimate, and some of the small tiles."""
    step, program, x = make(next(c for c in CASES if c.label == label))
    instruction, want = INSTRUCTIONS[intrinsic], weight_only_dot(step, x)
    legal = list(space(weight_only_geometry(step, program, instruction), instruction))
    assert len(set(legal)) == len(legal)
    small = [p for p in legal if p.rows * p.vectors <= 6]
    for params in {legal[0], legal[-1], *small[::5], replace(legal[0], chunks=3, parallel=True)}:
        check(execute(weight_only_kernel(step, program, instruction, params), x), want)


def test_codes_stay_in_their_bytes_only_where_unsigned_bytes_are_multiplied() -> None:
    step, program, _ = make(CASES[0])
    forms = {
        name: {p.shifted for p in space(weight_only_geometry(step, program, i), i)}
        for name, i in INSTRUCTIONS.items()
    }
    assert forms == {"avx512_vnni": {False, True}, "avx2_pmaddwd": {True}}


def test_steps_that_differ_in_constants_share_a_function() -> None:
    case = next(c for c in CASES if c.label == "two_bits_zeros")
    one, other = (weight_only_kernel(*make(c)[:2], CODE_VNNI) for c in (case, constant_variant(case)))
    assert one.key == other.key
    tvm.ir.assert_structural_equal(one.function, other.function, map_free_vars=True)
    assert not np.array_equal(one.constants[0], other.constants[0])


def test_the_zero_point_is_part_of_the_key() -> None:
    step, program, _ = make(CASES[0])
    lower = replace(step, zero_point=step.zero_point - np.uint8(1))
    assert (
        weight_only_kernel(step, program, CODE_VNNI).key != weight_only_kernel(lower, program, CODE_VNNI).key
    )


def test_weights_take_the_bytes_that_their_bits_say() -> None:
    for bits in (2, 4, 8):
        step, program, _ = make(Case("bytes", (1,), 256, 128, bits=bits))
        weight, scale = weight_only_kernel(step, program, CODE_VNNI).constants
        assert (weight.nbytes, scale.nbytes) == (256 * 128 * bits // 8, 8 * 128 * 4)


def test_one_load_serves_a_hundred_and_twenty_eight_weights() -> None:
    """In the loop over groups: 4 loads of 64 bytes and 8 products a column vector, nothing is spilled."""
    step, program, _ = make(Case("asm", (1,), 1024, 16))
    kernel = weight_only_kernel(step, program, CODE_VNNI, WeightOnlyParams(1, 1, False, 1, False))
    text = compiled(kernel).mod.inspect_source("asm")
    assert len(re.findall(r"\bvpdpbusd\b", text)) == 8
    assert len(re.findall(r"\bvpand\w*\b.*zmm", text)) >= 8
    assert not re.search(r"vmovdqu?\w* .*zmm\d+, .*\(%rsp\)", text)


@pytest.mark.parametrize(
    ("profile", "chosen"),
    [("x86-amx", "avx512_vnni"), ("x86-avx512-vnni", "avx512_vnni"), ("x86-avx2", "avx2_pmaddwd")],
)
def test_shipped_profiles_name_the_instruction(profile: str, chosen: str) -> None:
    step, program, _ = make(CASES[0])
    loaded = load_profile(profile)
    offered = candidates(step, program, loaded)
    assert {c.intrinsic for c in offered} == {chosen}
    assert {c.template for c in offered} == {"weight_only"}
    assert dot_kernel(step, program, loaded).key == dot_kernel(step, program, loaded, offered[0]).key
    assert dot_kernel(step, program, loaded).key != dot_kernel(step, program, loaded, offered[-1]).key


def test_an_illegal_choice_is_refused() -> None:
    step, program, _ = make(CASES[0])
    loaded = load_profile("x86-avx512-vnni")
    wrong = replace(candidates(step, program, loaded)[0], intrinsic="avx2_pmaddwd")
    with pytest.raises(ProfileError, match="no way to compute this step"):
        dot_kernel(step, program, loaded, wrong)


def test_rows_without_a_kernel_are_refused() -> None:
    step, program, _ = make(CASES[0])
    profile = load_profile("x86-avx512-vnni")
    rules = {
        name: rule.model_copy(
            update={
                "combos": tuple(
                    c.model_copy(update={"intrinsics": ("avx512_fma",)}) if c.format == "w4" else c
                    for c in rule.combos
                    if c.format in ("int8", "w4")
                )
            }
        )
        for name, rule in profile.runtimes.artifact.ops.items()
        if name == "MatMul"
    }
    artifact = profile.runtimes.artifact.model_copy(update={"ops": rules})
    changed = profile.model_copy(
        update={"runtimes": profile.runtimes.model_copy(update={"artifact": artifact})}
    )
    with pytest.raises(ProfileError, match="avx512_fma"):
        dot_kernel(step, program, changed)


def test_a_family_without_such_kernels_refuses() -> None:
    step, program, _ = make(CASES[0])
    with pytest.raises(ProfileError, match="grouped weights") as caught:
        backend_for("cortex_m").dot_kernel(step, program, load_profile("cortex-m4"))
    assert caught.value.fix
