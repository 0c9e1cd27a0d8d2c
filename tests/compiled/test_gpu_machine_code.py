"""Machine code for every GPU profile, by nvcc without a GPU: it exists, it fits, it has the instructions."""

from __future__ import annotations

import pytest
import weight_only_reference
from dot_reference import CASES, Case
from gpu_cases import symmetric

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.backend import Kernel
from bitwright.targets.loader import load_profile
from bitwright.targets.nvidia_gpu import codegen, kernels
from bitwright.targets.nvidia_gpu.codegen import compile_cuda, cuda_source, find_nvcc
from bitwright.targets.nvidia_gpu.float_gemm import half_gemm_kernel
from bitwright.targets.nvidia_gpu.mma_tiles import Tiling
from bitwright.targets.nvidia_gpu.ptxas import require_fitting

needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc of CUDA 12 or 13 is not installed")
PROFILES = ("nvidia-a100", "nvidia-orin", "nvidia-ada", "nvidia-h100")


def _kernels(name: str) -> dict[str, Kernel]:
    """Return a large product, a convolution, one for dp4a, a depthwise one and one with grouped weights."""
    profile = load_profile(name)
    found = {}
    shapes = {
        "large": Case("large", (1024, 1024), (1024, 1024), y_dtype="int8"),
        "conv": next(c for c in CASES if c.label == "conv3x3"),
        "row": Case("row", (1, 256), (256, 64), y_dtype="float32"),
        "depthwise": next(c for c in CASES if c.label == "depthwise_s1"),
    }
    for key, case in shapes.items():
        _, step, program, _ = symmetric(case)
        found[key] = kernels.dot_kernel(step, program, profile)
    grouped, program, _ = weight_only_reference.make(weight_only_reference.CASES[0])
    found["grouped"] = kernels.dot_kernel(grouped, program, profile)
    return found


@needs_nvcc
@pytest.mark.parametrize("name", PROFILES)
def test_machine_code_fits_the_profile(name: str) -> None:
    profile = load_profile(name)
    gpu = kernels.gpu_of(profile)
    found = _kernels(name)
    source = cuda_source({key: kernel.function for key, kernel in found.items()}, gpu.architecture)
    cubin, resources = compile_cuda(source.text, gpu.architecture)
    assert cubin[:4] == b"\x7fELF"
    assert int.from_bytes(cubin[18:20], "little") == 0xBE  # EM_CUDA
    require_fitting(resources, gpu, source.launches())
    assert {r.name for r in resources} == {f"{key}_kernel" for key in found}


@needs_nvcc
def test_the_instructions_are_in_the_code() -> None:
    found = {"grouped": "dp4a.s32.s32", "row": "dp4a.s32.s32"}
    tensor = (
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
        "cp.async.cg.shared.global",
        "ldmatrix.sync.aligned",
    )
    for key, kernel in _kernels("nvidia-a100").items():
        if key == "depthwise":
            continue
        ptx = compile_cuda(cuda_source({key: kernel.function}, "sm_80").text, "sm_80", "ptx")[0].decode()
        wanted = (found[key],) if key in found else tensor
        assert all(opcode in ptx for opcode in wanted), key
        # The epilogue's arithmetic is as written: a product and a sum are fused only where fma is asked for.
        assert ("fma.rn.f32" in ptx) == (kernel.output_dtype == "float32"), key


@needs_nvcc
def test_hopper_gets_warp_group_products() -> None:
    profile = load_profile("nvidia-h100")
    _, step, program, _ = symmetric(Case("large", (4096, 512), (512, 4096), y_dtype="int8"))
    kernel = kernels.dot_kernel(step, program, profile)
    source = cuda_source({"k": kernel.function}, "sm_90a")
    ptx = compile_cuda(source.text, "sm_90a", "ptx")[0].decode()
    # Libraries hold a fatbin, whose parts are for this one architecture.
    require_fitting(
        compile_cuda(source.text, "sm_90a", "fatbin")[1], kernels.gpu_of(profile), source.launches()
    )
    assert "wgmma.mma_async.sync.aligned.m64n" in ptx
    assert "fence.proxy.async.shared::cta" in ptx


@needs_nvcc
def test_fp16_product_has_its_instruction() -> None:
    import numpy as np

    kernel = half_gemm_kernel(256, np.zeros((256, 256), np.float16), None, Tiling(128, 128, 64, 64, 64, 3))
    source = cuda_source({"half": kernel.function}, "sm_89")
    ptx = compile_cuda(source.text, "sm_89", "ptx")[0].decode()
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in ptx
    _, resources = compile_cuda(source.text, "sm_89")
    require_fitting(resources, kernels.gpu_of(load_profile("nvidia-ada")), source.launches())


@needs_nvcc
def test_what_does_not_compile_is_reported() -> None:
    with pytest.raises(ToolchainError, match=r"kernels\.cu"):
        compile_cuda('extern "C" __global__ void k() { undeclared(); }', "sm_80")


def test_without_nvcc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "find_nvcc", lambda: None)
    with pytest.raises(ToolchainError, match="nvcc is not installed"):
        compile_cuda("", "sm_80")
