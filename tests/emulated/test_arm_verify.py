"""Whole bundles for Arm processors under qemu: every integer kernel equals the interpreter bit for bit."""

from pathlib import Path

import pytest
from arm_trials import compile_for
from small_bundle import ONE_STEP, feeds

from bitwright.compiler.bundle.verify import verify
from bitwright.targets.arm_cpu.backend import executes_on
from bitwright.targets.loader import load_profile

pytestmark = [pytest.mark.emulated, pytest.mark.slow]


@pytest.mark.parametrize("target", ["arm-cortex-a53", "arm-cortex-a76"])
def test_kernels_are_exact(target: str, tmp_path: Path) -> None:
    found = verify(compile_for(target, tmp_path))
    found.check()
    assert (found.executed, found.sets) == ("emulated", 2)
    assert found.calls >= 2 * 3, "Quantize, Gemm and Add at least, on two golden sets"
    assert found.seconds is None
    assert all(o.difference.largest <= ONE_STEP for o in found.outputs)


def test_the_dot_product_profile_needs_its_processor(tmp_path: Path) -> None:
    """The Gemm kernel for the Cortex-A76 uses sdot; the Cortex-A72 does not have it."""
    out = compile_for("arm-cortex-a76", tmp_path)
    profile = load_profile("arm-cortex-a76")
    assert executes_on(out, feeds(0), profile, "cortex-a76")
    assert not executes_on(out, feeds(0), profile, "cortex-a72")
