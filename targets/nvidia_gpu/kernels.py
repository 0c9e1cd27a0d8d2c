"""The dot-product kernels of NVIDIA GPUs: which template and which instruction a step gets."""

from __future__ import annotations

from collections.abc import Callable

from bitwright.compiler.errors import ProfileError
from bitwright.compiler.lower.templates.choice import (
    as_choice,
    available_intrinsics,
    dot_of,
    interleaved,
    no_kernel,
    params_of,
    require_candidate,
)
from bitwright.compiler.lower.templates.geometry import geometry_of
from bitwright.compiler.program.ops import Dot, Program, Step, WeightOnlyDot
from bitwright.targets.backend import Kernel, KernelChoice
from bitwright.targets.nvidia_gpu import dp4a_depthwise, weight_only_gpu
from bitwright.targets.nvidia_gpu.dp4a import Dp4aEngine
from bitwright.targets.nvidia_gpu.mma import tiled_kernel
from bitwright.targets.nvidia_gpu.mma_engine import Engine, s8_engine
from bitwright.targets.nvidia_gpu.mma_tiles import (
    DP4A_UNIT,
    MMA_UNIT,
    WGMMA_UNIT,
    Tiling,
    cost,
    extent_of,
    space,
)
from bitwright.targets.nvidia_gpu.mma_wgmma import WgmmaEngine
from bitwright.targets.schema import Profile
from bitwright.targets.sections.gpu import Gpu

WGMMA_S8, MMA_S8, DP4A, DP4A_W4 = "wgmma_s8", "mma_s8", "dp4a", "dp4a_w4"
WGMMA_ARCHITECTURE = "sm_90a"
IMPLICIT_GEMM, DEPTHWISE, WEIGHT_ONLY = "implicit_gemm", "depthwise", "weight_only"
UNITS = {WGMMA_S8: WGMMA_UNIT, MMA_S8: MMA_UNIT, DP4A: DP4A_UNIT}
ENGINES: dict[str, Callable[[Tiling], Engine]] = {WGMMA_S8: WgmmaEngine, MMA_S8: s8_engine, DP4A: Dp4aEngine}
MAX_CANDIDATES = 300
# Below these a tensor core's tile is mostly padding.
FEW_ROWS, FEW_COLUMNS = 4, 8


def candidates(step: Step, program: Program, profile: Profile) -> tuple[KernelChoice, ...]:
    """Return the ways to compute a QGemm, QConv or WeightOnlyDot step, the default first.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: The profile describes no GPU, or allows no instruction known here.
    """
    gpu = gpu_of(profile)
    if isinstance(step, WeightOnlyDot):
        return _weight_only_candidates(step, program, profile, gpu)
    available = available_intrinsics(step, program, profile)
    known = [name for name in available if name in UNITS and _has(gpu, name)]
    if not known:
        raise no_kernel(available, UNITS)
    _, geometry = dot_of(step, program)
    if geometry.is_depthwise:
        return tuple(as_choice(DEPTHWISE, DP4A, params) for params in dp4a_depthwise.space(geometry))
    output = 0 if program.tensor(step.output).quant is None else 1
    tilings = {name: list(space(extent_of(geometry), gpu, output, UNITS[name])) for name in known}
    small = geometry.pixels <= FEW_ROWS or geometry.group_outputs < FEW_COLUMNS

    def order(name: str) -> tuple[bool, float]:
        return (name == DP4A) != small, cost(tilings[name][0], extent_of(geometry), gpu, UNITS[name])

    ordered = sorted((name for name in known if tilings[name]), key=order)
    spaces = ([as_choice(IMPLICIT_GEMM, name, tiling) for tiling in tilings[name]] for name in ordered)
    return tuple(interleaved(spaces, MAX_CANDIDATES))


def _has(gpu: Gpu, intrinsic: str) -> bool:
    """Tell whether machine code for a GPU has an instruction: warp-group products are Hopper's alone."""
    return intrinsic != WGMMA_S8 or gpu.architecture == WGMMA_ARCHITECTURE


def _weight_only_candidates(
    step: WeightOnlyDot, program: Program, profile: Profile, gpu: Gpu
) -> tuple[KernelChoice, ...]:
    rows = [row.name for row in profile.compute]
    if DP4A_W4 not in rows:
        raise no_kernel(rows, (DP4A_W4,))
    tiles = weight_only_gpu.space(weight_only_gpu.geometry_on_gpu(step, program), gpu)
    found = tuple(as_choice(WEIGHT_ONLY, DP4A_W4, tile) for tile in tiles)
    if not found:
        what = f"a row of {step.weight.shape[0]} rounded activations does not fit a block's shared memory"
        raise ProfileError(what, where=step.name, fix="quantize the weight for 8-bit kernels (int8, w4a8)")
    return found


def gpu_of(profile: Profile) -> Gpu:
    """Return the profile's GPU.

    Raises:
        ProfileError: It has none.
    """
    if profile.gpu is None:
        msg = f"profile '{profile.name}' does not say what its GPU has"
        raise ProfileError(msg, where="gpu", fix="give the profile a section 'gpu'")
    return profile.gpu


def dot_kernel(step: Step, program: Program, profile: Profile, choice: KernelChoice | None = None) -> Kernel:
    """Return the kernel of a QGemm, QConv or WeightOnlyDot step of any shape.

    Raises:
        InternalError: The step is not a dot product.
        ProfileError: The profile allows no instruction known here, or ``choice`` is not a candidate.
    """
    known = candidates(step, program, profile)
    chosen = known[0] if choice is None else require_candidate(choice, known, step)
    if isinstance(step, WeightOnlyDot):
        tile = params_of(chosen, weight_only_gpu.WeightOnlyTile)
        return weight_only_gpu.weight_only_kernel(step, program, tile, chosen.intrinsic)
    dot, geometry = dot_of(step, program)
    if chosen.template == DEPTHWISE:
        plan = params_of(chosen, dp4a_depthwise.DepthwiseParams)
        return dp4a_depthwise.depthwise_kernel(dot, program, geometry, plan, chosen.intrinsic)
    return tiled(dot, program, params_of(chosen, Tiling), chosen.intrinsic)


def tiled(step: Dot, program: Program, tiling: Tiling, intrinsic: str) -> Kernel:
    """Return the kernel of a dot product for any legal tiling, be it a candidate or not.

    Raises:
        ProfileError: The activations are not symmetric int8, or a tensor is too large for 32-bit offsets.
    """
    engine = ENGINES[intrinsic](tiling)
    return tiled_kernel(step, program, geometry_of(step, program), engine, intrinsic)
