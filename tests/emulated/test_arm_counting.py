"""Executed instructions and modelled cycles: equal every time, proportional to the work, and called what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from arm_trials import Compiled, compile_for, compile_trials
from dot_reference import CASES
from small_bundle import feeds

from bitwright.compiler.errors import ToolchainError
from bitwright.targets.arm_cpu import cycle_model, emulated
from bitwright.targets.arm_cpu.counting import Count, count_inference, counted, read_counts, why_not_countable
from bitwright.targets.arm_cpu.cycle_model import find_cycle_model
from bitwright.targets.arm_cpu.kernel_calls import KernelArguments, call_kernels
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile
from bitwright.targets.toolchain import instruction_counter

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

# sdot v0.4s, v1.16b, v2.4b[1] and three more that write v3, v4 and v5: independent of each other.
SDOTS = [bytes.fromhex(f"{register:02x}e0a24f") for register in (0x20, 0x23, 0x24, 0x25)]


@pytest.fixture(scope="module", autouse=True)
def _countable() -> None:
    reason = why_not_countable(load_profile("arm-cortex-a76"))
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    cases = [c for c in CASES if c.label in ("gemm", "conv3x3")]
    return compile_trials("neon_sdot", cases, tmp_path_factory.mktemp("kernels"))


def count_calls(compiled: Compiled, number: int, times: int, folder: Path) -> Count:
    call = compiled.trials[number].call
    launch = counted(emulated.launch(compiled.profile), folder / "counts", blocks=True)
    call_kernels(
        compiled.library, [KernelArguments(call.symbol, call.arrays, times)], compiled.profile, launch
    )
    return read_counts(folder / "counts")


def test_counts_of_a_library_are_equal_and_linear(compiled: Compiled, tmp_path: Path) -> None:
    one, again, two, three = (
        count_calls(compiled, 0, times, tmp_path).within("kernels.so") for times in (1, 1, 2, 3)
    )
    assert one == again
    assert three - two == two - one > 0


def test_an_instruction_multiplies_sixteen_at_most(compiled: Compiled, tmp_path: Path) -> None:
    """Fewer instructions than sdot needs for the products cannot be right, eight times as many would be no kernel."""
    case = next(c for c in CASES if c.label == "conv3x3")
    macs = 14 * 14 * 64 * 32 * 9
    found = count_calls(compiled, 1, 1, tmp_path).within("kernels.so")
    assert compiled.trials[1].label == case.label
    assert macs / 16 < found < macs / 2


def test_an_inference_is_a_difference_of_runs(tmp_path: Path) -> None:
    bundle = compile_for("arm-cortex-a76", tmp_path)
    profile = load_profile("arm-cortex-a76")
    first, second = (count_inference(bundle, feeds(0), profile, blocks=True) for _ in range(2))
    assert first.within("model.so") == second.within("model.so") > 0
    # The clock is read and printed in the runner, where digits differ from run to run.
    assert first.instructions == pytest.approx(second.instructions, rel=0.02)
    assert first.instructions >= first.within("model.so")


def test_the_timer_is_deterministic_and_says_modelled(compiled: Compiled) -> None:
    timer = backend_for("arm_cpu").kernel_timer(compiled.profile)
    if timer is None:
        pytest.skip("llvm-mca is not installed (apt-get install llvm)")
    trial = compiled.trials[1]
    (seconds, output), (again, _) = (
        timer.run(compiled.library, trial.call.symbol, trial.call.arrays) for _ in range(2)
    )
    assert seconds == again > 0
    np.testing.assert_array_equal(output, trial.wanted)
    assert timer.executed == "modelled" and "modelled" in timer.hardware and "llvm-mca" in timer.hardware


def test_cycles_follow_the_pipelines() -> None:
    """The Neoverse N1, and so the Cortex-A76, starts two dot products a cycle; a chain waits for its own results."""
    try:
        model = find_cycle_model("cortex-a76")
    except ToolchainError as error:
        pytest.skip(error.message)
    independent, chain = b"".join(SDOTS * 4), SDOTS[0] * 16
    cycles = model.cycles([independent, chain])
    assert cycles[independent] == pytest.approx(8, rel=0.1)
    assert cycles[chain] > 1.5 * cycles[independent]
    assert model.core == "neoverse-n1", "LLVM's entry of the Cortex-A76 is that of the Cortex-A57"


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cycle_model.shutil, "which", lambda _: None)
    cycle_model.find_cycle_model.cache_clear()
    with pytest.raises(ToolchainError, match="llvm-mca") as error:
        find_cycle_model("cortex-a76")
    assert "apt-get install" in error.value.fix
    assert backend_for("arm_cpu").kernel_timer(load_profile("arm-cortex-a76")) is None


def test_a_plug_in_that_cannot_be_compiled_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("this is no C\n")
    monkeypatch.setattr(instruction_counter, "SOURCE", broken)
    reason = why_not_countable(load_profile("arm-cortex-a76"))
    assert reason is not None and "broken.c" in reason


def test_a_damaged_file_of_counts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "counts").write_text("total 12\nblock zz 3 00\n")
    with pytest.raises(ToolchainError, match="cannot be read"):
        read_counts(tmp_path / "counts")
    with pytest.raises(ToolchainError, match="cannot be read"):
        read_counts(tmp_path / "absent")
