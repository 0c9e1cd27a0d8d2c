"""Every dot-product kernel of x86 equals the integer program's formulas bit for bit."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tvm
from dot_reference import CASES, Case, channels_last, expected, make, random_case
from tvm.script.ir_builder import tirx as T  # noqa: N812

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.choice import available_intrinsics
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.compiler.lower.templates.implicit_gemm import ImplicitGemmParams, implicit_gemm_kernel
from bitwright.compiler.lower.templates.scaffold import Parameter, build_function
from bitwright.targets.backend import Kernel
from bitwright.targets.loader import load_profile
from bitwright.targets.x86_cpu.amx import AmxParams, amx_kernel
from bitwright.targets.x86_cpu.kernels import VECTOR_INSTRUCTIONS, choose_intrinsic, dot_kernel, kernel_for

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
    got = execute(kernel_for(step, program, (intrinsic,)), channels_last(x, case), intrinsic)
    return got, channels_last(expected(step, program, x), case)


def execute(kernel: Kernel, x: np.ndarray, intrinsic: str) -> np.ndarray:
    module = tvm.IRModule({"main": kernel.function.with_attr("global_symbol", "main")})
    target = tvm.target.Target({"kind": "llvm", "mcpu": MCPU[intrinsic]})
    function = tvm.compile(module, target=target)["main"]
    # Written before and compared after, so that an element the kernel forgets cannot be right by chance.
    y = tvm.runtime.tensor(np.full(kernel.output_shape, 77, kernel.output_dtype))
    arrays = [tvm.runtime.tensor(a) for a in (x, *kernel.constants)]
    function(*arrays, y)
    return y.numpy()


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


@pytest.mark.parametrize("label", ["gemm_3d", "conv3x3_batch"])
def test_blocking_parameters_do_not_change_the_result(label, intrinsic):
    case = next(c for c in CASES if c.label == label)
    step, program, x = make(case)
    geometry = geometry_of(step, program)
    if intrinsic == "amx_int8":
        odd = AmxParams(rows=7, vectors=1, chunk=12, chunks=3, parallel=True, overlap=True)
        kernel = amx_kernel(step, program, geometry, odd)
    else:
        odd = ImplicitGemmParams(pixels=4, vectors=1, chunks=5, parallel=True)
        kernel = implicit_gemm_kernel(step, program, geometry, VECTOR_INSTRUCTIONS[intrinsic], odd)
    got = execute(kernel, channels_last(x, case), intrinsic)
    np.testing.assert_array_equal(got, channels_last(expected(step, program, x), case))


@pytest.mark.parametrize("label", ["conv1x1", "depthwise_s1"])
def test_steps_that_differ_in_constants_share_a_function(label, intrinsic):
    case = next(c for c in CASES if c.label == label)
    (first, program, _), (second, _, _) = make(case), make(replace(case, seed=9))
    one, other = (kernel_for(s, program, (intrinsic,)) for s in (first, replace(second, lower=first.lower)))
    assert one.key == other.key
    tvm.ir.assert_structural_equal(one.function, other.function, map_free_vars=True)
    assert not np.array_equal(one.constants[0], other.constants[0])


def test_key_tells_apart_what_is_compiled_in(intrinsic):
    step, program, _ = make(next(c for c in CASES if c.label == "conv3x3"))
    keys = {kernel_for(s, program, (intrinsic,)).key for s in (step, replace(step, upper=200))}
    assert len(keys) == 2


def test_amx_keeps_the_callers_tile_configuration():
    if "amx_int8" not in cpu_flags() or ctypes.CDLL(None).syscall(158, ARCH_REQ_XCOMP_PERM, TILE_DATA):
        pytest.skip("no AMX here")
    case = next(c for c in CASES if c.label == "gemm_narrow")
    step, program, x = make(case)
    kernel = kernel_for(step, program, ("amx_int8",))
    mine, after = (tvm.runtime.tensor(np.zeros(64, np.uint8)) for _ in range(2))
    config = np.zeros(64, np.uint8)
    config[[0, 16, 48]] = 1, 32, 9  # palette 1, tile 0: 9 rows of 32 bytes
    mine.copyfrom(config)
    functions = {
        "main": kernel.function.with_attr("global_symbol", "main"),
        "load_config": tile_config_function("ldtilecfg").with_attr("global_symbol", "load_config"),
        "store_config": tile_config_function("sttilecfg").with_attr("global_symbol", "store_config"),
    }
    target = tvm.target.Target({"kind": "llvm", "mcpu": MCPU["amx_int8"]})
    module = tvm.compile(tvm.IRModule(functions), target=target)
    arrays = [tvm.runtime.tensor(a) for a in (x, *kernel.constants)]
    y = tvm.runtime.tensor(np.zeros(kernel.output_shape, kernel.output_dtype))
    load_config, main, store_config = (module[name] for name in ("load_config", "main", "store_config"))
    load_config(mine)
    main(*arrays, y)
    store_config(after)
    np.testing.assert_array_equal(after.numpy(), config)


def tile_config_function(name: str):
    def body(buffers):
        address = T.address_of(buffers[0][0])
        T.evaluate(T.call_llvm_intrin(f"llvm.x86.{name}", address, dtype="void"))

    return build_function([Parameter("config", (64,), "uint8")], body)


def geometry(label: str):
    step, program, _ = make(next(c for c in CASES if c.label == label))
    return geometry_of(step, program)


@pytest.mark.parametrize(
    ("label", "available", "chosen"),
    [
        ("gemm", ("amx_int8", "avx512_vnni"), "amx_int8"),
        ("gemm_one_row", ("amx_int8", "avx512_vnni"), "avx512_vnni"),  # one row of sixteen
        ("gemm_k10", ("amx_int8", "avx512_vnni"), "avx512_vnni"),  # a tenth of a tile row
        ("gemm_one_row", ("amx_int8",), "amx_int8"),
        ("conv3x3", ("avx512_vnni", "avx2_pmaddwd"), "avx512_vnni"),
        ("conv3x3", ("avx2_pmaddwd", "avx512_vnni"), "avx2_pmaddwd"),  # the profile's order counts
    ],
)
def test_instruction_choice(label, available, chosen):
    assert choose_intrinsic(geometry(label), available) == chosen


def test_unknown_rows_are_refused():
    with pytest.raises(ProfileError, match="avx512_vnni"):
        choose_intrinsic(geometry("gemm"), ("neon_sdot",))


@pytest.mark.parametrize(
    ("profile", "label", "chosen"),
    [
        ("x86-amx", "gemm", "amx_int8"),
        ("x86-amx", "gemm_one_row", "avx512_vnni"),
        ("x86-avx512-vnni", "conv3x3", "avx512_vnni"),
        ("x86-avx2", "conv3x3", "avx2_pmaddwd"),
        ("x86-avx2", "depthwise_s1", "avx2_pmaddwd"),
        ("x86-avx2", "conv_multiplier", "avx2_pmaddwd"),
    ],
)
def test_shipped_profiles_name_the_instruction(profile, label, chosen):
    step, program, _ = make(next(c for c in CASES if c.label == label))
    assert dot_kernel(step, program, load_profile(profile)).intrinsic == chosen


def test_a_profile_without_listed_instructions_offers_its_integer_rows():
    step, program, _ = make(next(c for c in CASES if c.label == "gemm"))
    profile = load_profile("x86-avx2")
    artifact = profile.runtimes.artifact.model_copy(update={"ops": {}})
    bare = profile.model_copy(update={"runtimes": profile.runtimes.model_copy(update={"artifact": artifact})})
    assert available_intrinsics(step, program, bare) == ("avx2_pmaddwd",)
