"""The GPU's kernels in the CPU emulation: equal to the formulas of the integer program, bit for bit."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import weight_only_reference
from dot_reference import CASES, Case, random_case, random_depthwise
from gpu_cases import A100, cases, check, emulated, run, symmetric

from bitwright.compiler.errors import BitwrightError, InternalError, ProfileError
from bitwright.compiler.interpret.weight_only import weight_only_dot
from bitwright.compiler.lower.templates.choice import dot_of
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.loader import load_profile
from bitwright.targets.nvidia_gpu import kernels
from bitwright.targets.nvidia_gpu.codegen import CudaSource, DeviceFunction, Launch, cuda_source
from bitwright.targets.nvidia_gpu.emulation import POLICIES, Emulated, why_not_emulated
from bitwright.targets.nvidia_gpu.float_gemm import half_gemm_kernel
from bitwright.targets.nvidia_gpu.mma import tiled_kernel
from bitwright.targets.nvidia_gpu.mma_engine import s8_engine
from bitwright.targets.nvidia_gpu.mma_stage import swizzled
from bitwright.targets.nvidia_gpu.mma_tiles import Tiling, extent_of, space
from bitwright.targets.nvidia_gpu.mma_wgmma import WgmmaEngine

pytestmark = pytest.mark.skipif(why_not_emulated() is not None, reason=str(why_not_emulated()))
PROFILE = load_profile("nvidia-a100")
ALL = [
    *cases(),
    *(random_case(np.random.default_rng(70 + i), 70 + i) for i in range(6)),
    *(random_depthwise(np.random.default_rng(90 + i), 90 + i) for i in range(3)),
]
TILINGS = (
    Tiling(16, 16, 32, 16, 16, 2),
    Tiling(64, 32, 32, 32, 16, 4),
    Tiling(32, 64, 64, 16, 32, 3),
    Tiling(64, 64, 128, 32, 32, 2),
    Tiling(128, 64, 64, 64, 64, 4),
)


def _choices(case: Case) -> list[KernelChoice]:
    """Return the default, and the first choice of the other instruction or the last one."""
    _, step, program, _ = symmetric(case)
    known = kernels.candidates(step, program, PROFILE)
    other = next((c for c in known if c.intrinsic != known[0].intrinsic), known[-1])
    return [known[0], other]


@pytest.fixture(scope="module")
def machine() -> tuple[Emulated, dict[str, Kernel]]:
    """All cases' kernels in one source."""
    built = {}
    for number, case in enumerate(ALL):
        _, step, program, _ = symmetric(case)
        for which, choice in enumerate(_choices(case)):
            built[f"case{number}_{which}"] = kernels.dot_kernel(step, program, PROFILE, choice)
    return emulated(built), built


@pytest.mark.parametrize("number", range(len(ALL)), ids=lambda n: ALL[n].label)
def test_kernels_equal_the_formulas(number: int, machine: tuple[Emulated, dict[str, Kernel]]) -> None:
    case, step, program, x = symmetric(ALL[number])
    emulation, built = machine
    physical = x.transpose(0, 2, 3, 1) if x.ndim == 4 and len(case.w) == 4 else x
    for which in range(2):
        name = f"case{number}_{which}"
        for policy in POLICIES:
            check(case, step, program, x, run(emulation, name, built[name], physical, policy))


def _labelled(label: str) -> Case:
    return next(c for c in CASES if c.label == label)


def _tiled(case: Case, tiling: Tiling) -> tuple[Kernel, tuple]:
    case, step, program, x = symmetric(case)
    kernel = tiled_kernel(step, program, geometry_of(step, program), s8_engine(tiling), "mma_s8")
    return kernel, (case, step, program, x)


def test_the_result_does_not_depend_on_the_tile() -> None:
    case = _labelled("conv3x3_batch")
    built = {f"tile{i}": _tiled(case, tiling) for i, tiling in enumerate(TILINGS)}
    emulation = emulated({name: kernel for name, (kernel, _) in built.items()})
    for name, (kernel, (symmetric_case, step, program, x)) in built.items():
        for policy in POLICIES:
            got = run(emulation, name, kernel, x.transpose(0, 2, 3, 1), policy)
            check(symmetric_case, step, program, x, got)


GROUP_TILINGS = (
    Tiling(128, 256, 128, 16, 256, 4),
    Tiling(64, 64, 128, 16, 64, 2),
    Tiling(128, 128, 128, 16, 64, 3),
)


def test_warp_groups_equal_the_formulas() -> None:
    shapes = (Case("product", (150, 300), (300, 270), y_dtype="int8"), _labelled("conv3x3_batch"))
    built, steps = {}, {}
    for number, shape in enumerate(shapes):
        steps[number] = symmetric(shape)
        _, step, program, _ = steps[number]
        for which, tiling in enumerate(GROUP_TILINGS):
            name = f"group{number}_{which}"
            built[name] = tiled_kernel(
                step, program, geometry_of(step, program), WgmmaEngine(tiling), "wgmma_s8"
            )
    emulation = emulated(built)
    for name, kernel in built.items():
        case, step, program, x = steps[int(name[5])]
        physical = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
        for policy in POLICIES:
            check(case, step, program, x, run(emulation, name, kernel, physical, policy))


def test_warp_groups_that_are_not_waited_for_are_noticed() -> None:
    case, step, program, x = symmetric(Case("product", (64, 512), (512, 64), y_dtype="int8"))
    engine = WgmmaEngine(Tiling(64, 64, 128, 16, 64, 3))
    kernel = tiled_kernel(step, program, geometry_of(step, program), engine, "wgmma_s8")
    source = cuda_source({"product": kernel.function}, "sm_90a")
    head, text = source.text.split('extern "C" __global__', 1)
    without = re.sub(r"bw_wgmma_wait_64\([^;]*\);", "", text)
    broken = Emulated(replace(source, text=f'{head}extern "C" __global__{without}'))
    with pytest.raises(AssertionError, match="differ"):
        check(case, step, program, x, run(broken, "product", kernel, x, POLICIES[0]))


def test_hopper_multiplies_large_tiles_by_warp_groups() -> None:
    hopper = load_profile("nvidia-h100")
    _, step, program, _ = symmetric(Case("large", (4096, 1024), (1024, 4096)))
    assert kernels.candidates(step, program, hopper)[0].intrinsic == "wgmma_s8"
    _, step, program, _ = symmetric(Case("small", (32, 384), (384, 384)))
    assert kernels.candidates(step, program, hopper)[0].intrinsic == "mma_s8"
    assert hopper.gpu is not None
    newer = hopper.model_copy(update={"gpu": hopper.gpu.model_copy(update={"architecture": "sm_100"})})
    assert "wgmma_s8" in {c.intrinsic for c in kernels.candidates(step, program, hopper)}
    assert "wgmma_s8" not in {c.intrinsic for c in kernels.candidates(step, program, newer)}


@pytest.mark.parametrize("removed", [r"bw_wait_\d\(\);", r"bw_barrier\(\);", r"bw_commit\(\);"])
def test_the_emulation_notices_what_a_kernel_lacks(removed: str) -> None:
    case = Case("gemm", (64, 256), (256, 64), x_dtype="int8", y_dtype="int8")
    kernel, (symmetric_case, step, program, x) = _tiled(case, Tiling(64, 64, 64, 32, 32, 3))
    source = cuda_source({"gemm": kernel.function}, "sm_80")
    head, text = source.text.split('extern "C" __global__', 1)
    assert re.search(removed, text)
    broken = Emulated(replace(source, text=head + 'extern "C" __global__' + re.sub(removed, "", text)))
    noticed = []
    for policy in POLICIES:
        try:
            check(symmetric_case, step, program, x, run(broken, "gemm", kernel, x, policy))
        except (AssertionError, BitwrightError):
            noticed.append(policy)
    assert noticed


def _source(body: str, threads: int = 64) -> CudaSource:
    text = f'extern "C" __global__ void __launch_bounds__(64) k(signed char* x, int* y) {{ {body} }}'
    launch = Launch("k", ("x", "y"), (1, 1, 1), (threads, 1, 1), 1024)
    return CudaSource(text, {"f": DeviceFunction(("x", "y"), {}, (launch,))})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 40) bw_barrier();", "not all threads"),
        ("if (threadIdx.x == 3) __syncwarp();", "not all threads"),
        ("bw_copy_async_16(buf_dyn_shmem, x + 1, 1);", "unaligned asynchronous copy"),
        ("bw_copy_async_16(buf_dyn_shmem, x + 64, 1);", "outside the kernel's arguments"),
        ("bw_copy_async_16(buf_dyn_shmem + 1024, x, 1);", "outside shared memory"),
        ("y[16 + threadIdx.x % 2] = 1;", "outside its parameter 'y'"),
        (
            "int d[4], a[4], b[4]; if (threadIdx.x % 32) bw_mma_s8(d, a, b); else __syncwarp();",
            "different operations",
        ),
    ],
)
def test_the_emulation_refuses_wrong_kernels(body: str, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        Emulated(_source(body)).call("f", [np.zeros(64, np.int8), np.zeros(16, np.int32)])


def test_matrices_lie_in_different_banks() -> None:
    """The eight rows that ldmatrix reads at once take all 32 banks, whatever the piece and the depth of a stage."""
    for block_k in (32, 64, 128):
        tiling = Tiling(64, 64, block_k, 32, 32, 2)
        for first in range(0, 64, 8):
            for chunk in range(tiling.chunks):
                offsets = [swizzled(row, chunk, tiling) for row in range(first, first + 8)]
                assert len({offset % 128 for offset in offsets}) == 8
                assert all(
                    row * block_k <= o < (row + 1) * block_k
                    for row, o in zip(range(first, first + 8), offsets, strict=True)
                )


WEIGHT_ONLY = [*weight_only_reference.CASES, *(weight_only_reference.random_case(i) for i in range(3))]


@pytest.fixture(scope="module")
def weight_only_machine() -> tuple[Emulated, dict[str, Kernel]]:
    built = {}
    for number, case in enumerate(WEIGHT_ONLY):
        step, program, _ = weight_only_reference.make(case)
        known = kernels.candidates(step, program, PROFILE)
        for which, choice in enumerate((known[0], known[-1])):
            built[f"case{number}_{which}"] = kernels.dot_kernel(step, program, PROFILE, choice)
    return emulated(built), built


@pytest.mark.parametrize("number", range(len(WEIGHT_ONLY)), ids=lambda n: WEIGHT_ONLY[n].label)
def test_grouped_weights_equal_the_interpreter(
    number: int, weight_only_machine: tuple[Emulated, dict[str, Kernel]]
) -> None:
    step, _, x = weight_only_reference.make(WEIGHT_ONLY[number])
    emulation, built = weight_only_machine
    want = weight_only_dot(step, x)
    for which, policy in enumerate(POLICIES):
        name = f"case{number}_{which}"
        got = run(emulation, name, built[name], x, policy)
        same = (got.view(np.int32) == want.view(np.int32)) | (np.isnan(got) & np.isnan(want))
        assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ"


@pytest.mark.parametrize(("m", "k", "n"), [(37, 70, 50), (16, 128, 64)])
def test_fp16_product_agrees_to_rounding(m: int, k: int, n: int) -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.normal(size=(m, k)).astype(np.float16), rng.normal(size=(k, n)).astype(np.float16)
    bias = rng.normal(size=n).astype(np.float32)
    kernel = half_gemm_kernel(m, weight, bias, Tiling(32, 32, 64, 16, 16, 3), relu=True)
    got = run(emulated({"half": kernel}), "half", kernel, x, POLICIES[0])
    want = np.maximum(x.astype(np.float64) @ weight.astype(np.float64) + bias, 0)
    # fp16 keeps 11 bits; sums in float32 add far less.
    assert np.abs(got - want).max() <= 2.0**-11 * np.abs(want).max() * 1.01


def test_an_odd_reduction_is_refused_in_fp16() -> None:
    with pytest.raises(ProfileError, match="even reduction"):
        half_gemm_kernel(4, np.zeros((7, 8), np.float16), None, TILINGS[0])


def test_asymmetric_activations_are_refused() -> None:
    case = next(c for c in CASES if c.label == "conv3x3")
    _, step, program, _ = symmetric(case)
    source = program.tensors["x"]
    assert source.quant is not None
    shifted = replace(source, quant=replace(source.quant, zero_point=3))
    with pytest.raises(ProfileError, match="symmetric int8"):
        kernels.dot_kernel(step, replace(program, tensors={**program.tensors, "x": shifted}), PROFILE)


def test_a_choice_that_is_no_candidate_is_refused() -> None:
    _, step, program, _ = symmetric(CASES[0])
    choice = kernels.candidates(step, program, PROFILE)[0]
    with pytest.raises(ProfileError, match="no way to compute"):
        kernels.dot_kernel(step, program, PROFILE, replace(choice, params=(("block_k", 48),)))


def test_shapes_that_do_not_fill_a_tile_get_dp4a_and_others_tensor_cores() -> None:
    chosen = {c.label: _choices(c)[0].intrinsic for c in cases()}
    assert chosen["conv3x3"] == chosen["gemm"] == "mma_s8"
    assert chosen["gemm_one_row"] == chosen["conv_multiplier"] == chosen["depthwise_s1"] == "dp4a"


def test_a_profile_without_tensor_cores_gets_dp4a() -> None:
    rows = tuple(row for row in PROFILE.compute if row.name != "mma_s8")
    ops = PROFILE.runtimes.artifact.ops
    plain = {
        name: rule.model_copy(
            update={"combos": tuple(c.model_copy(update={"intrinsics": ("dp4a",)}) for c in rule.combos)}
        )
        for name, rule in ops.items()
    }
    artifact = PROFILE.runtimes.artifact.model_copy(update={"ops": plain})
    runtimes = PROFILE.runtimes.model_copy(update={"artifact": artifact})
    profile = PROFILE.model_copy(update={"compute": rows, "runtimes": runtimes})
    _, step, program, _ = symmetric(next(c for c in CASES if c.label == "conv3x3"))
    assert {c.intrinsic for c in kernels.candidates(step, program, profile)} == {"dp4a"}


def test_large_products_get_large_tiles_that_fit() -> None:
    case = Case("large", (4096, 4096), (4096, 4096))
    _, step, program, _ = symmetric(case)
    best = next(space(extent_of(dot_of(step, program)[1]), A100, 1))
    assert best.block_m * best.block_n >= 128 * 128
    assert best.block_k >= 64
    assert best.shared_bytes(1) <= A100.shared_bytes_per_block


def test_a_weight_tile_is_part_of_the_key() -> None:
    step, program, _ = weight_only_reference.make(weight_only_reference.CASES[0])
    known = kernels.candidates(step, program, PROFILE)
    keys = {kernels.dot_kernel(step, program, PROFILE, choice).key for choice in known}
    assert len(keys) == len(known)
