"""What tests of ARM kernels share: many kernels in one library, and a whole small bundle, or a skip with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tvm
from dot_reference import Case, channels_last, expected, make, random_case, random_depthwise
from small_bundle import fill

from bitwright.compiler.bundle.writer import BundleWriter
from bitwright.compiler.lower.compile import export_objects
from bitwright.targets.arm_cpu.kernel_calls import KernelArguments
from bitwright.targets.arm_cpu.kernels import candidates_for, kernel_for
from bitwright.targets.backend import KernelChoice, backend_for
from bitwright.targets.loader import load_profile
from bitwright.targets.schema import Profile

BACKEND = backend_for("arm_cpu")
UNWRITTEN = 77
RANDOM_SHAPES = 48
# Rows allowed -> profile they are compiled for.
FAMILIES = {
    "neon_smmla": "arm-neoverse-n2",
    "neon_sdot": "arm-cortex-a76",
    "neon_smlal": "arm-cortex-a72",
}


@dataclass(frozen=True)
class Trial:
    """A kernel of the library: its step's label, how it is computed, what it is called with, what it must write."""

    label: str
    choice: KernelChoice
    call: KernelArguments
    wanted: np.ndarray


@dataclass(frozen=True)
class Compiled:
    profile: Profile
    library: Path
    trials: list[Trial]


def random_cases(row: str) -> list[Case]:
    """Return random steps, other ones for every row; the same however many are asked for."""
    seed = list(FAMILIES).index(row)
    kinds = [random_depthwise if number % 4 == 0 else random_case for number in range(RANDOM_SHAPES)]
    return [kind(np.random.default_rng([seed, number]), number) for number, kind in enumerate(kinds)]


def trial(number: int, case: Case, row: str, random: np.random.Generator) -> tuple[Trial, object]:
    """Every second kernel is the default, the others are drawn from the whole space."""
    step, program, x = make(case)
    found = candidates_for(step, program, (row,))
    choice = found[0] if number % 2 == 0 else found[int(random.integers(len(found)))]
    kernel = kernel_for(step, program, (row,), choice)
    symbol = f"kernel_{number}"
    output = np.full(kernel.output_shape, UNWRITTEN, kernel.output_dtype)
    call = KernelArguments(symbol, [channels_last(x, case), *kernel.constants, output])
    wanted = channels_last(expected(step, program, x), case).reshape(kernel.output_shape)
    function = kernel.function.without_attr("global_symbol").with_attr("global_symbol", symbol)
    return Trial(case.label, choice, call, wanted), function


def compile_trials(row: str, cases: list[Case], folder: Path) -> Compiled:
    profile = load_profile(FAMILIES[row])
    reason = BACKEND.why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    random = np.random.default_rng(17)
    made = [trial(number, case, row, random) for number, case in enumerate(cases)]
    module = tvm.IRModule({t.call.symbol: function for t, function in made})
    executable = tvm.compile(module, target=tvm.target.Target(BACKEND.tvm_target(profile)))
    (folder / "objects").mkdir()
    BACKEND.link(export_objects(executable, folder / "objects"), folder / "kernels.so", profile)
    return Compiled(profile, folder / "kernels.so", [t for t, _ in made])


def compile_for(target: str, folder: Path) -> Path:
    """Compile a small model to a whole bundle."""
    profile = load_profile(target)
    reason = BACKEND.why_not_executable(profile)
    if reason:
        pytest.skip(reason)
    with BundleWriter(folder / "out") as writer:
        fill(writer.path, profile)
        return writer.commit(profile)
