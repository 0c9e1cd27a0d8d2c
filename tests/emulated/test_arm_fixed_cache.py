"""Decoders with caches of fixed capacity on an emulated ARM processor."""

from pathlib import Path

import numpy as np
import pytest
from decoder_bundle import PIECES, SIZES, decoder_options

from bitwright.compiler.pipeline import compile_model
from bitwright.targets.backend import backend_for
from bitwright.targets.loader import load_profile

pytestmark = [pytest.mark.emulated]
TARGET = "arm-cortex-a76"


def test_a_prompt_and_a_token_are_computed_on_arm(tmp_path: Path) -> None:
    reason = backend_for("arm_cpu").why_not_executable(load_profile(TARGET))
    if reason:
        pytest.skip(reason)
    made = compile_model(decoder_options(tmp_path, target=TARGET))
    assert made is not None
    found = made.report["verification"]
    assert found["executed"] == "emulated" and found["passed"]
    assert found["bounded"] == SIZES.layers * found["sets"]
    golden = list(made.golden())
    assert {g.inputs["ids"].shape[1] for g in golden} == set(PIECES)
    for data in golden:
        expected = made.run(data.inputs, "ort")["scores"]
        # A float island's last bit may move one rounding of an activation by a step.
        np.testing.assert_allclose(made.run(data.inputs)["scores"], expected, atol=0.02 * np.ptp(expected))
