"""Dot-product kernels for 64-bit ARM under qemu: exact on random shapes, refused by processors without the instruction.

All kernels of one processor are compiled into one library and executed in one start of the emulator.
"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from arm_trials import FAMILIES, compile_trials, random_cases
from dot_reference import CASES, make

from bitwright.targets.arm_cpu import emulated
from bitwright.targets.arm_cpu.kernel_calls import call_kernels
from bitwright.targets.arm_cpu.kernels import kernel_for
from bitwright.targets.toolchain.process import ToolCrashError

pytestmark = [pytest.mark.emulated, pytest.mark.slow]


@pytest.mark.parametrize("row", FAMILIES)
def test_kernels_are_exact_on_any_shape(row: str, tmp_path: Path) -> None:
    compiled = compile_trials(row, [*CASES, *random_cases(row)], tmp_path)
    launch = emulated.launch(compiled.profile)
    outputs = call_kernels(compiled.library, [t.call for t in compiled.trials], compiled.profile, launch)
    wrong = [
        f"{t.label}: {t.choice.label()}: {int((t.wanted != output).sum())} of {output.size} values"
        for t, output in zip(compiled.trials, outputs, strict=True)
        if not np.array_equal(t.wanted, output)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("row", "has_it", "lacks_it"),
    [("neon_smmla", "max", "cortex-a76"), ("neon_sdot", "cortex-a76", "cortex-a72")],
)
def test_the_instruction_is_really_needed(row: str, has_it: str, lacks_it: str, tmp_path: Path) -> None:
    """An older processor refuses the code: the profile's ceiling is a fact, not a label."""
    case = next(c for c in CASES if c.label == "gemm")
    compiled = compile_trials(row, [case], tmp_path)
    calls = [t.call for t in compiled.trials]
    (output,) = call_kernels(
        compiled.library, calls, compiled.profile, emulated.launch(compiled.profile, has_it)
    )
    np.testing.assert_array_equal(output, compiled.trials[0].wanted)
    with pytest.raises(ToolCrashError) as crash:
        call_kernels(compiled.library, calls, compiled.profile, emulated.launch(compiled.profile, lacks_it))
    assert crash.value.signal == signal.SIGILL


def test_small_sums_take_the_short_way_to_float_and_large_ones_do_not() -> None:
    """Both branches of the conversion are among the cases above; this says which is where."""
    keys = {}
    for label in ("gemm", "gemm_extreme"):
        step, program, _ = make(next(c for c in CASES if c.label == label))
        keys[label] = kernel_for(step, program, ("neon_sdot",)).key
    assert "True)" in keys["gemm"].split("MmlaParams")[1]
    assert "False)" in keys["gemm_extreme"].split("MmlaParams")[1].split("parallel")[1]
