"""Steps for GPU kernels: symmetric int8 activations, and their execution in the CPU emulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from dot_reference import CASES, Case, channels_last, expected, make, quant

from bitwright.compiler.program.ops import Dot, Program
from bitwright.targets.backend import Kernel
from bitwright.targets.nvidia_gpu.codegen import cuda_source
from bitwright.targets.nvidia_gpu.emulation import Emulated
from bitwright.targets.sections.gpu import Gpu

A100 = Gpu(
    architecture="sm_80",
    multiprocessors=108,
    shared_bytes_per_block=166912,
    shared_bytes_per_multiprocessor=167936,
)
# Every rule of addressing once: widths of copies 16, 8, 4 and 1, groups, strides, dilation, cropping, tails.
LABELS = (
    "gemm",
    "gemm_one_row",
    "gemm_narrow",
    "gemm_3d",
    "gemm_float",
    "gemm_extreme",
    "conv1x1_s2",
    "conv3x3",
    "conv3x3_batch",
    "conv_rgb_s2",
    "conv_10x4",
    "conv_dilated",
    "conv_cropped",
    "conv_groups",
    "conv_multiplier",
    "conv_float",
    "depthwise_s1",
    "depthwise_s2",
    "depthwise_7x7",
    "depthwise_dilated",
)


def symmetric(case: Case) -> tuple[Case, Dot, Program, np.ndarray]:
    """Return a case as the GPU has it: int8 with zero point 0, and an int8 or float output."""
    kept = case.y_dtype if case.y_dtype == "float32" else "int8"
    case = replace(case, x_dtype="int8", y_dtype=kept)
    step, program, x = make(case)
    source = program.tensors["x"]
    assert source.quant is not None
    tensors = {**program.tensors, "x": replace(source, quant=quant("int8", source.quant.scale, 0))}
    return case, step, replace(program, tensors=tensors), x


def cases() -> list[Case]:
    by_label = {case.label: case for case in CASES}
    return [by_label[label] for label in LABELS]


def emulated(kernels: Mapping[str, Kernel]) -> Emulated:
    """Compile many kernels at once: the host's compiler reads the emulation's header once."""
    return Emulated(cuda_source({name: kernel.function for name, kernel in kernels.items()}, "sm_80"))


def run(machine: Emulated, name: str, kernel: Kernel, x: np.ndarray, policy: int) -> np.ndarray:
    y = np.full(kernel.output_shape, 77, kernel.output_dtype)
    machine.call(name, [np.ascontiguousarray(x), *kernel.constants, y], policy)
    return y


def check(case: Case, step: Dot, program: Program, x: np.ndarray, got: np.ndarray) -> None:
    want = channels_last(expected(step, program, x), case)
    assert got.dtype == want.dtype
    wrong = np.count_nonzero(got != want)
    assert wrong == 0, f"{case.label}: {wrong} of {want.size} differ"
