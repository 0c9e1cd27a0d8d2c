"""Group lengths and zero points by error and bits: coarse where weights are alike, fine where they are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from bitwright.compiler.deploy import quantize
from bitwright.compiler.options import Options
from bitwright.compiler.ort.session import open_session, run
from bitwright.compiler.plan.granularity import choose_granularity
from bitwright.compiler.plan.planner import make_plan, plan_selection
from bitwright.compiler.plan.units import FormatChoice
from bitwright.targets.loader import load_profile

MODEL = '<ir_version: 8, opset_import: ["" : 17]> m (float[4,256] x) => (float[4,64] y) { y = MatMul(x, w) }'
PROFILE = load_profile("x86-avx512-vnni")
RNG = np.random.default_rng(2)
ALIKE = RNG.standard_normal((256, 64))
# One block of 32 rows is four times larger than the others: whoever shares its scale has four times the error.
STEPS = ALIKE * np.repeat([0.25, 0.25, 1.0, 0.25, 0.25, 0.25, 0.25, 0.25], 32)[:, None]
SHIFTED = np.abs(ALIKE) + 4.0


def model(weight: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(MODEL)
    proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), "w"))
    return ir.from_proto(proto)


@pytest.mark.parametrize(
    ("weight", "lengths", "points"),
    # Zero points are nearly free in long groups, so nothing is asked of weights around zero.
    [(ALIKE, {256, 128}, None), (STEPS, {64, 32}, None), (SHIFTED, {256, 128, 64}, True)],
    ids=["alike", "steps", "shifted"],
)
def test_the_layout_follows_the_weights(weight: np.ndarray, lengths: set[int], points: bool | None) -> None:
    subject = model(weight)
    selection = plan_selection(subject, PROFILE, "onnxruntime", {}, formats=FormatChoice(("w4",)))
    plan = make_plan(selection, {}, PROFILE, "onnxruntime", {}, method="minmax")
    chosen = choose_granularity(plan, subject, {}).weights["w"]
    assert chosen.group in lengths
    assert points is None or (chosen.zero_point is not None) == points
    assert chosen.scale.shape == (256 // chosen.group, 64)


def test_a_recipe_asks_for_it_and_the_file_runs(tmp_path: Path) -> None:
    ir.save(model(STEPS), tmp_path / "m.onnx")
    (tmp_path / "fine.yaml").write_text(
        "schema: 1\nname: fine\nformats: [w4]\nrounding: {granularity: error}\n"
        "migrate: {smooth: false, equalize: false, disassemble: 0.0}\n"
    )
    x = [{"x": RNG.standard_normal((4, 256)).astype(np.float32)} for _ in range(8)]
    made = quantize(
        Options(
            model=tmp_path / "m.onnx",
            target="x86-avx512-vnni",
            data=x,
            output=tmp_path / "q.onnx",
            recipe=str(tmp_path / "fine.yaml"),
            gate=False,
        )
    )
    exact = x[0]["x"].astype(np.float64) @ STEPS
    found = run(open_session(made.model), x[0])["y"]
    # 4 bits: steps of a fifteenth of a range of some 4 standard deviations, noise of 12 to 13 % at worst.
    assert np.linalg.norm(found - exact) < 0.13 * np.linalg.norm(exact)
