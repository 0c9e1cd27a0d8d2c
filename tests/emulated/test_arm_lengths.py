"""Sequences of any length, and half precision, on emulated ARM processors."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from encoder_model import text_of, texts, write_encoder
from test_dynamic import options, rows, written

from bitwright.compiler.options import Options
from bitwright.compiler.pipeline import compile_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

pytestmark = [pytest.mark.emulated]


def skip_unless_emulated(target: str) -> None:
    reason = backend_for("arm_cpu").why_not_executable(load_profile(target))
    if reason:
        pytest.skip(reason)


ATTENTION = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[1, T, 16] x) => (float[1, T, 16] y)
{
  h = MatMul (x, w)
  t = Transpose <perm = [0, 2, 1]> (h)
  scores = MatMul (h, t)
  shares = Softmax <axis = -1> (scores)
  y = MatMul (shares, h)
}
"""


def test_any_length_is_computed_on_arm(tmp_path: Path) -> None:
    target = "arm-cortex-a76"
    skip_unless_emulated(target)
    model = written(ATTENTION, tmp_path / "attention.onnx")
    data = rows(lambda k: (1, 9 + k % 3, 16))
    made = compile_model(options(model, tmp_path / "out", target=target, data=data, dynamic="T"))
    assert made is not None and made.rules is not None
    found = made.report["verification"]
    assert found["executed"] == "emulated" and found["passed"] and found["sets"] == len(list(made.golden()))
    assert {golden.inputs["x"].shape[1] for golden in made.golden()} >= {1, 7, 16, 33, 128}
    largest = {golden.number: np.abs(golden.outputs["y"]).max() for golden in made.golden()}
    compared = [o for o in found["outputs"] if o["reference"] == "golden"]
    assert {o["golden"] for o in compared} == set(largest)
    # The integer product is exact; the rest is float code of two runtimes.
    assert all(o["difference"]["largest"] <= 1e-5 * (1 + largest[o["golden"]]) for o in compared)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("arm-cortex-a76", "their matrix products multiply in half precision"),
        ("arm-cortex-a53", "their matrix products are computed in float32"),
    ],
)
def test_half_precision_on_arm(tmp_path: Path, target: str, words: str) -> None:
    """Cortex-A53 has no arithmetic of halves: an instruction of it would end the emulated process."""
    skip_unless_emulated(target)
    model = write_encoder(tmp_path / "encoder.onnx")
    made = compile_model(
        Options(
            model=model,
            output=tmp_path / "out",
            target=target,
            data=texts(),
            dims={"N": 1, "T": 12},
            golden=1,
            recipe="fp16",
        )
    )
    assert made is not None
    assert words in str(made.report)
    types = {i.data_type for i in onnx.load(made.path / "model.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types
    feeds = text_of(12, 3)
    found, expected = made.run(feeds), made.run(feeds, "ort")
    for name, array in expected.items():
        # A few roundings of 2^-11 through a dozen layers.
        assert np.abs(found[name] - array).max() <= 4e-3 * np.ptp(array)
