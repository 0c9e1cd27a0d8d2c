"""Files for the Ethos-U in TFLite's reference kernels: every operator equals its integer model bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ethos_u_programs as programs
import numpy as np
import pytest

from bitwright.compiler.errors import ToolchainError
from bitwright.compiler.interpret.run import run_program
from bitwright.compiler.program.ops import Program
from bitwright.targets.ethos_u.execution import accepted, compare_layers, host_inputs, host_outputs
from bitwright.targets.ethos_u.translate import Translation, translate_program
from bitwright.targets.loader import load_profile

pytest.importorskip("ai_edge_litert", reason="needs LiteRT: pip install 'bitwright[ethos-u]'")
pytest.importorskip("flatbuffers", reason="needs flatbuffers: pip install 'bitwright[ethos-u]'")

from bitwright.targets.ethos_u.litert import ReferenceSession
from bitwright.targets.ethos_u.tflite_file import tflite_bytes

REQUANTIZE = load_profile("ethos-u55-128").numerics.requantize
CASES = 40


def executed(program: Program, folder: Path, rng: np.random.Generator) -> tuple[Translation, dict, dict]:  # type: ignore[type-arg]
    """Write, execute; return the translation, the float inputs and every activation of the file."""
    translation = translate_program(program)
    path = folder / "model.tflite"
    path.write_bytes(tflite_bytes(accepted(translation), "test"))
    feeds = {}
    for name, integers in translation.steps.inputs.items():
        quant = program.tensor(integers).quant
        assert quant is not None
        values = rng.integers(-128, 128, program.tensor(integers).shape)
        feeds[name] = ((values - quant.zero_point) * np.float32(quant.scale)).astype(np.float32)
    given = host_inputs(translation, feeds)
    return translation, feeds, ReferenceSession(path, everything=True).run(given) | given


@pytest.mark.parametrize(
    "make",
    [
        programs.conv,
        programs.gemm,
        programs.add,
        programs.mul,
        programs.pool,
        programs.moves,
        programs.resize,
        programs.lut,
    ],
)
def test_every_layer_equals_its_integer_model(
    make: Callable[[np.random.Generator], Program], tmp_path: Path
) -> None:
    rng = np.random.default_rng(7)
    refused: Counter[str] = Counter()
    for case in range(CASES):
        program = make(rng)
        found = translate_program(program)
        if found.refused:
            refused.update(found.refused.values())
            continue
        translation, _, recorded = executed(program, tmp_path, rng)
        for check in compare_layers(translation, recorded, REQUANTIZE):
            assert np.array_equal(check.actual, check.expected), (case, check.step, check.part)
    assert sum(refused.values()) <= CASES // 4, refused


@pytest.mark.parametrize("make", [programs.conv, programs.gemm, programs.add, programs.mul])
def test_rounding_differs_from_the_float_scale_by_at_most_one(
    make: Callable[[np.random.Generator], Program], tmp_path: Path
) -> None:
    """Two ways to round one real number: never further apart than neighbours, and equal nearly everywhere."""
    rng = np.random.default_rng(11)
    different = elements = 0
    for _ in range(CASES):
        program = make(rng)
        translation, feeds, recorded = executed(program, tmp_path, rng)
        ours = host_outputs(translation, recorded)["result"]
        quant = program.tensor(translation.steps.outputs["result"]).quant
        assert quant is not None
        steps = np.abs(ours - run_program(program, feeds)["result"]) / np.float32(quant.scale)
        assert steps.max() <= 1.001
        different, elements = different + int(np.count_nonzero(steps > 0.5)), elements + steps.size
    assert different <= 0.01 * elements


def test_the_rounding_of_the_profile_matters(tmp_path: Path) -> None:
    """With the other rounding some outputs of convolutions would differ: the comparison sees a single step."""
    rng = np.random.default_rng(3)
    wrong = REQUANTIZE.model_copy(update={"rounding": "half_up"})
    different = 0
    for _ in range(CASES):
        translation, _, recorded = executed(programs.conv(rng), tmp_path, rng)
        checks = compare_layers(translation, recorded, wrong)
        different += sum(int(np.count_nonzero(c.actual != c.expected)) for c in checks)
    assert different > 0


def test_a_damaged_file_is_an_error_of_the_tool(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    content = tflite_bytes(accepted(translate_program(programs.conv(np.random.default_rng(0)))), "test")
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ToolchainError, match="do not execute"):
        ReferenceSession(path)
