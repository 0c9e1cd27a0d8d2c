"""Functions for any number of elements on emulated ARM processors: every kernel call equals the interpreter."""

from pathlib import Path

import pytest
from test_dynamic import FOLDED, options, rows, written

from bitwright.compiler.pipeline import compile_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

pytestmark = [pytest.mark.emulated]


@pytest.mark.parametrize("target", ["arm-cortex-a76", "arm-neoverse-n2"])
def test_any_batch_is_computed_on_arm(tmp_path: Path, target: str) -> None:
    """Blocks of 64, 16, 4 and 1 with dot-product and matrix instructions, at batches that nothing was compiled for."""
    reason = backend_for("arm_cpu").why_not_executable(load_profile(target))
    if reason:
        pytest.skip(reason)
    model = written(FOLDED, tmp_path / "folded.onnx")
    made = compile_model(options(model, tmp_path / "out", target=target, data=rows(lambda _: (1, 5, 16))))
    assert made is not None and made.rules is not None
    found = made.report["verification"]
    assert found["executed"] == "emulated" and found["passed"] and found["sets"] == 7
    batches = {golden.inputs["x"].shape[0] for golden in made.golden()}
    assert batches == {1, 2, 3, 7, 17, 33, 100}
