"""A hybrid artifact for an Arm processor: libraries under qemu, the rest in ONNX Runtime here, and said so."""

from pathlib import Path

import pytest
from recurrent_model import samples, save_recurrent

from bitwright.compiler.bundle.verify import verify
from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

pytestmark = [pytest.mark.emulated]


def test_libraries_are_emulated_and_the_rest_is_not(tmp_path: Path) -> None:
    reason = backend_for("arm_cpu").why_not_executable(load_profile("arm-cortex-a76"))
    if reason:
        pytest.skip(reason)
    model = save_recurrent(tmp_path / "model.onnx")
    options = Options(model=model, data=samples(), output=tmp_path / "out", target="arm-cortex-a76")
    bundle = compile_model(options)
    assert bundle is not None and bundle.segments is not None
    assert [s.executor for s in bundle.segments.segments] == ["kernels", "onnxruntime", "kernels"]
    found = verify(bundle.path, samples=1)
    found.check()
    assert (found.executed, found.seconds) == ("emulated", None)
    assert found.calls >= 4, "two quantizers and two products"
    headline, left = found.lines()[:2]
    assert headline.startswith("executed (emulated)")
    assert "ran in ONNX Runtime on this machine" in left and "GRU" in left
